"""Predictions of a model folder with nnU-Net's own predictor, one case at a time, with the
confidence in each voxel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.inference.build_network import build_network
from stunet_plugin.utils.files import check_whole, read_json
from stunet_plugin.weights.safe_loading import load_checkpoint


@dataclass(frozen=True)
class Prediction:
    """What a model says about a case.

    Attributes:
        labels: (z, y, x).
        confidence: (z, y, x), float32: the probability of the predicted class; with regions, of the
            decision on the region that the model is least sure of.
        properties: geometry, for the reader that writes labels.
        voxel_mm3: volume of a voxel.
    """

    labels: np.ndarray
    confidence: np.ndarray
    properties: dict[str, Any]
    voxel_mm3: float


class Model:
    """A model folder of nnU-Net, ready to predict.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: that are used, their outputs averaged.
        dataset: its ``dataset.json``.
        reader: nnU-Net's reader and writer of its images.
        trainer, plans_name, configuration: what trained it.
        predictor: nnU-Net's, with the weights loaded.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str] | None,
        checkpoint: str,
        step_size: float,
        mirroring: bool,
        device: str,
    ) -> None:
        """Read everything.

        Raises:
            PluginError: no model folder, a fold or checkpoint that it lacks, or a network that
                cannot predict.
        """
        if not 0 < step_size <= 1:
            raise PluginError(
                f"--step-size must be above 0 and at most 1 patch, not {step_size:g}."
            )
        self.folder = folder.absolute()
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                raise PluginError(
                    f"{folder} is no model folder of nnU-Net: it has no {name}. Name the folder"
                    " TRAINER__PLANS__CONFIGURATION in nnUNet_results, or import published weights"
                    " with `stunet import`."
                )
        self.dataset = read_json(folder / "dataset.json")
        self.folds = tuple(folds) if folds is not None else _trained_folds(folder, checkpoint)
        self.files = [folder / f"fold_{fold}" / checkpoint for fold in self.folds]
        lacking = [file for file in self.files if not file.is_file()]
        if lacking:
            trained = ", ".join(_trained_folds(folder, checkpoint))
            raise PluginError(
                f"{lacking[0]}: there is no such file. Folds with a {checkpoint}: {trained} (-f)."
            )
        # On the CPU it says that it will not do what it was not asked to do.
        with contextlib.redirect_stdout(None):
            self.predictor = nnUNetPredictor(
                step_size, True, mirroring, device == "cuda", torch.device(device), allow_tqdm=False
            )
        self._initialise(read_json(folder / "plans.json"))

    def _initialise(self, plans: dict[str, Any]) -> None:
        manager = PlansManager(plans)
        checkpoints = [load_checkpoint(file) for file in self.files]
        first = checkpoints[0]
        self.trainer, self.configuration = (
            str(first.get("trainer_name")),
            str((first.get("init_args") or {}).get("configuration")),
        )
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
        try:
            network.load_state_dict(weights[0])
        except RuntimeError as error:
            raise PluginError(
                f"The weights in {self.files[0]} do not fit the plan of {self.folder}: {error}"
            ) from error
        axes = first.get("inference_allowed_mirroring_axes")
        self.predictor.manual_initialization(
            network, manager, chosen, weights, self.dataset, self.trainer, axes
        )
        self.reader = manager.image_reader_writer_class()

    @property
    def channels(self) -> int:
        return len(self.dataset.get("channel_names", self.dataset.get("modality", {})))

    def predict(self, images: Sequence[Path]) -> Prediction:
        """Predict a case of one image per channel.

        Raises:
            PluginError: an image cannot be read.
        """
        for image in images:
            check_whole(image)
        try:
            array, properties = self.reader.read_images([os.fspath(image) for image in images])
        except Exception as error:  # each reader has its own
            raise PluginError(
                f"{images[0]} cannot be read: {last_line(error)}. Mend or remove the case."
            ) from error
        labels, probabilities = self.predictor.predict_single_npy_array(
            array, properties, None, None, True
        )
        if self.predictor.label_manager.has_regions:
            confidence = np.maximum(probabilities, 1 - probabilities).min(axis=0)
        else:
            confidence = probabilities.max(axis=0)
        return Prediction(
            np.asarray(labels), confidence, properties, float(np.prod(properties["spacing"]))
        )


def _trained_folds(folder: Path, checkpoint: str) -> tuple[str, ...]:
    """The folds that have a checkpoint; the one of all cases only where there are no others, as
    nnU-Net does."""
    found = sorted(
        path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")
    )
    numbered = tuple(fold for fold in found if fold != "all")
    if not found:
        raise PluginError(
            f"{folder} has no fold_X/{checkpoint}. Is it trained? Another checkpoint: -chk"
        )
    return numbered or tuple(found)
