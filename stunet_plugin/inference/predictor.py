"""Trained models run on images, with nnU-Net's own predictor: the only place that does so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.inference import confidence_map
from stunet_plugin.inference.build_network import build_network
from stunet_plugin.inference.slabs import Labels, NotFiniteError, SlabPredictor
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.image_files import MOVE, ImageError, place_image, side_files
from stunet_plugin.utils.images import read_images
from stunet_plugin.utils.validation import channel_names
from stunet_plugin.weights.safe_loading import load_checkpoint

PARTIAL = ".partial"


@dataclass(frozen=True)
class Prediction:
    """What a model says about a case: arrays (z, y, x), and the geometry for the reader. The
    confidence is that of :class:`stunet_plugin.inference.slabs.Labels`."""

    labels: np.ndarray
    confidence: np.ndarray
    properties: dict[str, Any]
    voxel_mm3: float


class Model:
    """A model folder of nnU-Net, ready to predict; of any trainer that nnU-Net finds.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: to average; None takes all that are trained.
        checkpoint: file of each fold.
        step_size: of the sliding window, in patches, above 0 and at most 1.
        mirroring: average over mirrored images, as the model was trained.
        device: ``cpu``, ``cuda`` or ``mps``.
        progress: show the windows that are done.

    Raises:
        PluginError: no model folder, a fold or checkpoint that it lacks, or a network that cannot
            predict.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str] | None = None,
        checkpoint: str = CHECKPOINT,
        step_size: float = 0.5,
        mirroring: bool = True,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        if not 0 < step_size <= 1:
            raise PluginError(f"--step-size must be above 0 and at most 1, not {step_size:g}.")
        self.folder = folder.absolute()
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                raise PluginError(
                    f"{folder} is no model folder of nnU-Net: it has no {name}. Name the folder"
                    " TRAINER__PLANS__CONFIGURATION in nnUNet_results, or import published weights"
                    " with `stunet import`."
                )
        self.dataset = read_json(folder / "dataset.json")
        channel_names(self.dataset, f"{folder / 'dataset.json'}")
        trained = trained_folds(folder, checkpoint)
        self.folds = trained if folds is None else tuple(folds)
        self.files = [folder / f"fold_{fold}" / checkpoint for fold in self.folds]
        lacking = [file for file in self.files if not file.is_file()]
        if lacking:
            known = f"Folds with a {checkpoint}: {', '.join(trained)} (-f)."
            raise PluginError(f"{lacking[0]}: no such file. {known}")
        # On the CPU it says that it will not do what it was not asked to do.
        with contextlib.redirect_stdout(None):
            self.predictor = SlabPredictor(
                step_size,
                True,
                mirroring,
                device == "cuda",
                torch.device(device),
                allow_tqdm=progress,
            )
        plans = read_json(folder / "plans.json")
        try:
            self._initialise(PlansManager(plans))
        except (PluginError, MemoryError):
            raise
        except Exception as error:  # nnU-Net and networks raise whatever an odd entry breaks
            raise PluginError(
                f"{folder}: its plans.json or dataset.json cannot be used"
                f" ({type(error).__name__}: {last_line(error)}). Copy them again from where the"
                " model was trained."
            ) from error

    def _initialise(self, manager: PlansManager) -> None:
        checkpoints = [load_checkpoint(file) for file in self.files]
        first = checkpoints[0]
        self.trainer = str(first.get("trainer_name"))
        self.configuration = str((first.get("init_args") or {}).get("configuration"))
        self.plans_name = manager.plans_name
        if self.configuration not in manager.available_configurations:
            raise PluginError(
                f"{self.files[0]} is of configuration {self.configuration}, which"
                f" {self.folder}/plans.json lacks."
            )
        chosen = manager.get_configuration(self.configuration)
        if chosen.previous_stage_name is not None:
            raise PluginError(
                f"{self.folder} is the second stage of a cascade, which needs the predictions of"
                " the first. Use a model of 3d_fullres or 2d, or predict with nnUNetv2_predict."
            )
        outputs = manager.get_label_manager(self.dataset).num_segmentation_heads
        network = build_network(
            self.trainer, manager, chosen, self.channels, outputs, deep_supervision=False
        )
        weights = [checkpoint["network_weights"] for checkpoint in checkpoints]
        # With one fold, its tensors become the network's: one copy in memory.
        own = network.state_dict()
        same = all(x not in own or own[x].dtype == y.dtype for x, y in weights[0].items())
        try:
            network.load_state_dict(weights[0], assign=same and len(weights) == 1)
        except RuntimeError as error:
            raise PluginError(
                f"The weights in {self.files[0]} do not fit the plan of {self.folder}: {error}"
            ) from error
        axes = first.get("inference_allowed_mirroring_axes")
        self.predictor.manual_initialization(
            network, manager, chosen, weights, self.dataset, self.trainer, axes
        )
        self.predictor.loaded = weights[0]
        self.reader = manager.image_reader_writer_class()

    @property
    def channels(self) -> int:
        return len(self.dataset.get("channel_names", self.dataset.get("modality", {})))

    def read(self, images: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the images of a case (channel, z, y, x) and their geometry, strictly checked.

        Raises:
            ImageError: one is damaged, not finite, or of another kind than the model takes.
        """
        return read_images(images, self.reader, self.channels)

    def check(self, cases: Iterable[Sequence[Path]]) -> None:
        """Read all cases, so that nothing stops the prediction later.

        Raises:
            PluginError: some cannot be used; the message lists up to ten.
        """
        problems = []
        for images in cases:
            try:
                self.read(images)
            except ImageError as error:
                problems.append(str(error))
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise PluginError("\n".join([*problems[:10], *more]))

    def predict(self, images: Sequence[Path]) -> Prediction:
        """Predict a case of one image per channel.

        Raises:
            PluginError: an image cannot be used, or the network's output is not finite.
        """
        array, properties = self.read(images)
        found = self.segment(*self.preprocess(array, properties), str(images[0]), confidence=True)
        volume = float(np.prod(properties["spacing"]))
        assert found.confidence is not None
        return Prediction(found.labels, found.confidence, properties, volume)

    def preprocess(
        self, array: np.ndarray, properties: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return images as :meth:`read` returns them, (channel, *spatial) as the network takes
        them, and what nnU-Net notes of the way."""
        configuration = self.predictor.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        plans = self.predictor.plans_manager
        data, _, noted = preprocessor.run_case_npy(
            array, None, dict(properties), plans, configuration, self.dataset
        )
        return torch.from_numpy(data), noted

    def segment(
        self, data: torch.Tensor, properties: dict[str, Any], case: str, **settings: Any
    ) -> Labels:
        """Return the labels of a preprocessed case; see :meth:`SlabPredictor.segment`.

        Raises:
            PluginError: the network's output is not finite.
        """
        try:
            return self.predictor.segment(data, properties, **settings)
        except NotFiniteError as error:
            raise PluginError(
                f"{self.folder} predicts NaN for {case}: its weights are damaged, or its"
                " training diverged. Try another checkpoint (-chk)."
            ) from error

    def predict_files(
        self,
        cases: Mapping[Path, Sequence[Path]],
        processes: int = 1,
        confidences: Path | None = None,
    ) -> Iterator[Path]:
        """Predict cases to files as nnUNetv2_predict does; yield each when it is complete and in
        place, with the files that belong to it.

        ``cases`` maps the file to write, in an existing folder, to the images of the case. One
        process preprocesses in this one. ``confidences`` is a folder that gets a map of the
        confidence for each, under the same name, as :mod:`.confidence_map` has it.
        """
        prepared = self._preprocessed(list(cases.values()), processes)
        for target in cases:
            with contextlib.redirect_stdout(None):
                item = next(prepared)
            properties, confidence = item["data_properties"], confidences is not None
            found = self.segment(item["data"], properties, str(target), confidence=confidence)
            if confidences is not None and found.confidence is not None:
                steps = confidence_map.encode(found.confidence)
                self._write(steps, properties, confidences / target.name)
            self._write(found.labels, properties, target)
            yield target

    def _write(self, values: np.ndarray, properties: dict[str, Any], target: Path) -> None:
        """Write a map of integers in place of an earlier one, complete or not at all."""
        partial = target.parent / PARTIAL
        partial.mkdir(exist_ok=True)
        try:
            written = partial / target.name
            self.reader.write_seg(values, str(written), properties)
            for old in (*side_files(target), target) if target.exists() else ():
                old.unlink()
            place_image(written, target, MOVE)
        finally:
            for left in partial.iterdir():
                left.unlink()
            partial.rmdir()

    def _preprocessed(
        self, cases: Sequence[Sequence[Path]], processes: int
    ) -> Iterator[dict[str, Any]]:
        predictor = self.predictor
        plans, configuration = predictor.plans_manager, predictor.configuration_manager
        files = [[str(image) for image in images] for images in cases]
        if processes > 1:
            from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles

            pinned = predictor.device.type == "cuda"
            yield from preprocessing_iterator_fromfiles(
                files, None, None, plans, self.dataset, configuration, processes, pinned
            )
            return
        preprocessor = configuration.preprocessor_class(verbose=False)
        for images in files:
            data, _, properties = preprocessor.run_case(
                images, None, plans, configuration, self.dataset
            )
            yield {"data": torch.from_numpy(data), "data_properties": properties}


def trained_folds(folder: Path, checkpoint: str = CHECKPOINT) -> tuple[str, ...]:
    """Return the folds that have a checkpoint; the one of all cases only where there are no
    others, as nnU-Net does.

    Raises:
        PluginError: there are none.
    """
    found = sorted(
        path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")
    )
    if not found:
        raise PluginError(
            f"{folder} has no fold_X/{checkpoint}. Is it trained? Another checkpoint: -chk"
        )
    return tuple(fold for fold in found if fold != "all") or tuple(found)
