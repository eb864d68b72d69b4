"""Segmentation of one scan by a model folder of nnU-Net: labels, statistics, and what was done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from scipy.ndimage import maximum_filter
from tqdm import tqdm

from stunet_plugin.errors import PluginError, did_you_mean, few
from stunet_plugin.inference.predictor import Model
from stunet_plugin.inference.slabs import Windows
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.segmentation.memory import check_memory
from stunet_plugin.segmentation.models import find_model
from stunet_plugin.segmentation.published import published_models
from stunet_plugin.segmentation.scans import CT, LEAST_AIR, MR, check_modality, find_scans
from stunet_plugin.utils.dicom import read_series
from stunet_plugin.utils.discovery import Source
from stunet_plugin.utils.image_files import ending_of
from stunet_plugin.utils.images import read_image
from stunet_plugin.utils.label_systems import LabelSystem
from stunet_plugin.utils.label_systems import published_facts as published_systems

AIR = -900
"""Hounsfield units: windows with nothing above hold only air."""
COARSE = 4
"""Voxels of a block in which air is looked for."""


@dataclass(frozen=True)
class Structure:
    """What was found of a structure.

    Attributes:
        labels: its label values; several for a region that holds others.
        voxels: how many; 0 where it was not found.
        volume_ml: of all of them; None in a picture, whose pixels have no size.
        mean_intensity: of the first channel; None where it was not found.
        touches_border: it may go on outside the image.
    """

    name: str
    labels: tuple[int, ...]
    voxels: int
    volume_ml: float | None
    mean_intensity: float | None
    touches_border: bool


@dataclass(frozen=True)
class Segmentation:
    """The result of :func:`stunet_plugin.segment`.

    Attributes:
        labels: (z, y, x), as the image file; of :class:`Segmenter`, as the model's reader has it.
        structures: name to label values, several for a region that holds others.
        names: of each label value; of a region's, where it is in no smaller one.
        image: first channel (z, y, x).
        spacing: (z, y, x) in mm; None for a picture, whose pixels have no size.
        properties: for nnU-Net's writer of label maps.
        windows: of the network, and how many were left out.
    """

    labels: np.ndarray
    structures: dict[str, tuple[int, ...]]
    names: dict[int, str]
    image: np.ndarray
    spacing: tuple[float, ...] | None
    properties: dict[str, Any]
    windows: Windows

    def in_the_order_of_the_file(self) -> Segmentation:
        """Return the same with the voxels in the order of the image file, which a reader of
        nnU-Net that turns images to RAS has changed; the properties are not for its writer then."""
        affines = self.properties.get("nibabel_stuff", {})
        if self.spacing is None or "reoriented_affine" not in affines:
            return self
        back = ornt_transform(
            io_orientation(affines["reoriented_affine"]), io_orientation(affines["original_affine"])
        )
        return self.turned(back)

    def turned(self, change: np.ndarray) -> Segmentation:
        """Return the same in another order of voxels, by nibabel's array of a change of orientation
        (axes x first); without the properties."""
        labels, image = (apply_orientation(x.T, change).T for x in (self.labels, self.image))
        spacing = [0.0, 0.0, 0.0]
        for step, axis in zip((self.spacing or (1.0,) * 3)[::-1], change[:, 0], strict=True):
            spacing[2 - int(axis)] = step
        return replace(self, labels=labels, image=image, spacing=tuple(spacing), properties={})

    def statistics(self) -> list[Structure]:
        """Return what was found of every structure, in the order of the label values."""
        most = max(value for values in self.structures.values() for value in values)
        voxels, sums = np.zeros(most + 1, int), np.zeros(most + 1)
        # Plane by plane: bincount copies its input to 8 bytes a voxel.
        for labels, image in zip(self.labels, self.image, strict=True):
            voxels += np.bincount(labels.ravel(), minlength=most + 1)
            sums += np.bincount(labels.ravel(), image.ravel(), most + 1)
        # A single plane has no neighbours along its axis.
        axes = [axis for axis, length in enumerate(self.labels.shape) if length > 1]
        border = {int(x) for axis in axes for x in np.unique(self.labels.take((0, -1), axis))}
        voxel_ml = float(np.prod(self.spacing)) / 1000 if self.spacing else None
        found = []
        for name, labels in self.structures.items():
            count, total = (int(voxels[[*labels]].sum()), float(sums[[*labels]].sum()))
            mean = total / count if count else None
            volume = None if voxel_ml is None else count * voxel_ml
            touches = not border.isdisjoint(labels)
            found.append(Structure(name, labels, count, volume, mean, touches))
        return found


class Segmenter:
    """A model, ready to segment scans.

    Args:
        model: a model folder of nnU-Net, the name of a published model (``stunet models``), or the
            ``hf://`` address of a checkpoint.
        structures: names of any label system; only these are computed to the end. None: all.
        step_size: of the sliding window, in patches.
        mirroring: average over mirrored images, as nnU-Net does by default; takes 8 times as long.
        device: ``cpu``, ``cuda`` or ``mps``.
        leave_out_air: do not run the network where a CT shows only air.
        force: take images of another modality than the model's.
        crop: find the structures in a coarse pass first, and run the network only around them.

    Raises:
        PluginError: no such model or structure.
    """

    def __init__(
        self,
        model: str | Path,
        structures: Sequence[str] | None = None,
        folds: Sequence[str] | None = None,
        checkpoint: str = CHECKPOINT,
        step_size: float = 0.5,
        mirroring: bool = False,
        device: str = "cpu",
        leave_out_air: bool = True,
        force: bool = False,
        progress: bool = False,
        crop: bool = False,
    ) -> None:
        folder = find_model(str(model))
        self.model = Model(folder, folds, checkpoint, step_size, mirroring, device, progress)
        dataset = self.model.dataset
        system = LabelSystem.from_table(dataset, folder.name)
        manager = self.model.predictor.label_manager
        named = {x: y for x, y in dataset["labels"].items() if x not in ("background", "ignore")}
        self.structures = {
            name: tuple(map(int, values if isinstance(values, (list, tuple)) else [values]))
            for name, values in named.items()
        }
        order = manager.regions_class_order if manager.has_regions else None
        # The value that each is written as, and the network's output for it.
        written = [int(x) for x in order] if order else [x[0] for x in self.structures.values()]
        outputs = dict(zip(self.structures, range(len(written)) if order else written, strict=True))
        self.modality = self._modality()
        self.leave_out_air, self.force, self.crop = leave_out_air, force, crop
        self.names = dict(zip(written, self.structures, strict=True))
        if structures:
            chosen = _find_structures(structures, system, self.structures)
            self.structures = {x: y for x, y in self.structures.items() if x in chosen}
            self.names = {x: y for x, y in self.names.items() if y in chosen}
            self.model.predictor.outputs = tuple(outputs[name] for name in self.structures)

    def _modality(self) -> str:
        for published in published_models().values():
            if self.model.folder == published.folder:
                return CT if published.modality.startswith(CT) else MR
        names = self.model.dataset.get("channel_names", self.model.dataset.get("modality", {}))
        first = str(names.get("0", "")).upper()
        return {"CT": CT, "MR": MR, "MRI": MR, "T1": MR, "T2": MR, "FLAIR": MR}.get(first, "")

    def segment(self, images: Sequence[Path | Source]) -> Segmentation:
        """Segment a scan of one image per channel, of any format that is known here.

        Raises:
            PluginError: an image cannot be used, or is of another modality.
        """
        return self._segment(*self._read(images), shown(images[0]))

    def check(self, images: Sequence[Path | Source]) -> None:
        """Read a scan; raise PluginError as :meth:`segment` would."""
        self._read(images)

    def _read(self, images: Sequence[Path | Source]) -> tuple[np.ndarray, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            array, properties = self.model.read(self._readable(images, Path(folder)))
        self._check_size(shown(images[0]), array.shape[1:], properties["spacing"])
        check_memory(self.model.predictor, shown(images[0]), array.shape, properties["spacing"])
        if not self.force:
            check_modality(shown(images[0]), array[0], self.modality)
        return array, properties

    def _check_size(self, path: str, shape: Sequence[int], spacing: Sequence[float]) -> None:
        """Raise a PluginError if an image (z, y, x) is no volume for a model of volumes."""
        predictor = self.model.predictor
        own = predictor.configuration_manager.spacing
        if len(own) < 3:
            return
        order = predictor.plans_manager.transpose_forward
        new = compute_new_shape([shape[x] for x in order], [spacing[x] for x in order], own)
        if min(shape) < 2 or min(new) < 1:
            raise PluginError(
                f"{path} is no volume: {' x '.join(map(str, shape))} voxels (z, y, x). The model"
                " takes volumes."
            )

    def segment_array(self, array: np.ndarray, spacing: Sequence[float]) -> Segmentation:
        """Segment an array (z, y, x) or (channel, z, y, x), in the orientation of the images that
        the model was trained on; the spacing is (z, y, x) in mm.

        Raises:
            PluginError: another number of axes or channels, or a spacing that is none.
        """
        array = np.asarray(array, np.float32)
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or len(array) != self.model.channels:
            raise PluginError(
                f"The array has shape {array.shape}; expected (channel, z, y, x) with"
                f" {self.model.channels} channel(s)."
            )
        if len(spacing) != 3 or not all(np.isfinite(x) and x > 0 for x in spacing):
            raise PluginError(f"The spacing must be three positive numbers, not {spacing}.")
        if not np.isfinite(array).all():
            raise PluginError("The array has voxels that are NaN or infinite.")
        self._check_size("The array", array.shape[1:], spacing)
        if not self.force:
            check_modality("The array", array[0], self.modality)
        return self._segment(array, {"spacing": [float(x) for x in spacing]}, "the array")

    def ending_of(self, images: Sequence[Path | Source]) -> str:
        """Return the file ending of a scan's label map: the scan's own, if nnU-Net's reader writes
        it."""
        own = "" if isinstance(images[0], Source) else ending_of(images[0])
        return own if own in self.model.reader.supported_file_endings else ".nii.gz"

    def _readable(self, images: Sequence[Path | Source], folder: Path) -> list[Path]:
        """Return images for the model's reader, converted to NIfTI where it does not know them."""
        files = [image for image in images if not isinstance(image, Source)]
        if files and ending_of(files[0]) in self.model.reader.supported_file_endings:
            return files
        if ".nii.gz" not in self.model.reader.supported_file_endings:
            known = ", ".join(self.model.reader.supported_file_endings)
            raise PluginError(f"{shown(images[0])}: the model takes images with {known}.")
        converted = []
        for number, image in enumerate(images):
            target = folder / f"{number}.nii.gz"
            voxels = read_series(image) if isinstance(image, Source) else read_image(image)
            sitk.WriteImage(voxels, str(target), useCompression=False)
            converted.append(target)
        return converted

    def _segment(self, array: np.ndarray, properties: dict[str, Any], case: str) -> Segmentation:
        data, noted = self.model.preprocess(array.copy(), properties)
        leave_out = None
        if self.leave_out_air and self.modality == CT and array[0].min() <= LEAST_AIR:
            forward = self.model.predictor.plans_manager.transpose_forward
            box = tuple(slice(*edges) for edges in noted["bbox_used_for_cropping"])
            leave_out = _only_air(array[0].transpose(forward)[box], data.shape[1:])
        found = self.model.segment(data, noted, case, leave_out=leave_out, crop=self.crop)
        if found.uncropped:
            tqdm.write(f"{case}: not cropped: {found.uncropped}.")
        is_picture = isinstance(self.model.reader, NaturalImage2DIO)
        spacing = None if is_picture else tuple(float(x) for x in properties["spacing"])
        return Segmentation(
            found.labels, self.structures, self.names, array[0], spacing, properties, found.windows
        )


def shown(image: Path | Source) -> str:
    """Return what messages and records call an image."""
    return image.shown if isinstance(image, Source) else str(image)


def _only_air(image: np.ndarray, shape: Sequence[int]) -> Callable[[Sequence[slice]], bool]:
    """Return a function that tells whether a window of the resampled image (of ``shape``) holds
    only air, looked up in blocks of the image before that."""
    air = image <= AIR
    steps = [slice(None, None, COARSE)] * 3
    # A block's own voxels and those around it.
    blocks = maximum_filter(~air, size=2 * COARSE + 1)[tuple(steps)]

    def is_air(window: Sequence[slice]) -> bool:
        place = []
        for part, size, length in zip(window, image.shape, shape, strict=True):
            first, last = part.start * size / length, part.stop * size / length
            place.append(slice(max(int(first // COARSE), 0), max(int(last // COARSE) + 1, 1)))
        return not blocks[tuple(place)].any()

    return is_air


def _find_structures(
    given: Sequence[str], system: LabelSystem, structures: dict[str, tuple[int, ...]]
) -> set[str]:
    """Return a model's structures by their names in any label system, groups among them."""
    chosen: set[str] = set()
    for name in given:
        values = system.find(name)
        same = {x for x, labels in structures.items() if sorted(labels) == sorted(values or ())}
        parts = {x for x, labels in structures.items() if set(labels) <= set(values or ())}
        if not values or not (same or parts):
            known = [*system.classes, *published_systems()["compositions"]]
            hint = did_you_mean(name, known)
            raise PluginError(
                f"The model has no structure {name!r}.{hint} It has: {few(list(structures), 120)}."
            )
        chosen |= same or parts
    return chosen


def segment(
    image: str | Path | Sequence[str | Path] | np.ndarray,
    model: str | Path,
    spacing: Sequence[float] | None = None,
    device: str = "auto",
    **settings: Any,
) -> Segmentation:
    """Segment one scan; see :func:`stunet_plugin.segment`."""
    from stunet_plugin.utils.device import choose_device

    segmenter = Segmenter(model, device=choose_device(device), **settings)
    if isinstance(image, np.ndarray | torch.Tensor):
        if spacing is None:
            raise PluginError("An array needs its spacing: spacing=(z, y, x) in mm.")
        return segmenter.segment_array(np.asarray(image), spacing)
    paths = [Path(x).expanduser() for x in ([image] if isinstance(image, str | Path) else image)]
    if len(paths) == 1 and paths[0].is_dir():
        modality = "" if segmenter.force else segmenter.modality
        scans = find_scans(str(paths[0]), segmenter.model.channels, modality)
        if len(scans) > 1:
            names = few([scan.name for scan in scans])
            raise PluginError(f"{paths[0]} holds {len(scans)} scans. Give one: {names}.")
        return segmenter.segment(scans[0].images).in_the_order_of_the_file()
    return segmenter.segment(paths).in_the_order_of_the_file()
