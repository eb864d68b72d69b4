"""Cases of the labelled dataset that weights are ranked for, prepared as a plan says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from stunet_plugin.datasets.raw_dataset import Case, RawDataset
from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.ranking.candidates import Plan
from stunet_plugin.ranking.options import Inputs
from stunet_plugin.utils import images
from stunet_plugin.utils.geometry import on_grid_of
from stunet_plugin.utils.image_files import PICTURES, TIFF, ImageError, ending_of


def class_names(raw: RawDataset) -> dict[int, str]:
    """Return label values with names, background included and the ignore label left out; regions
    count by their labels."""
    entries = raw.description["labels"].items()
    single = {value: name for name, value in entries if isinstance(value, int)}
    return {int(x): single.get(int(x), f"label {x}") for x in _label_manager(raw).all_labels}


def _label_manager(raw: RawDataset) -> LabelManager:
    try:
        return LabelManager(raw.description["labels"], raw.description.get("regions_class_order"))
    except Exception as error:  # it has several
        raise PluginError(
            f"nnU-Net cannot use the labels of {raw.folder} ({last_line(error)})."
        ) from error


def prepared_cases(inputs: Inputs, plan: Plan) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """Yield name, image (channel, z, y, x) and labels (z, y, x), prepared as the plan says, by
    nnU-Net before where it has preprocessed the dataset with this very plan."""
    ready = _preprocessed(inputs, plan)
    by_name = {case.name: case for case in inputs.raw.cases}
    for name in inputs.cases:
        if ready is not None:
            data, segmentation, _, _ = ready.load_case(name)
        else:
            data, segmentation = _prepare(by_name[name], inputs.raw, plan)
        image = np.ascontiguousarray(data[:], dtype=np.float32)
        yield name, torch.from_numpy(image), np.asarray(segmentation[0])


def _preprocessed(inputs: Inputs, plan: Plan) -> Any:
    """Return nnU-Net's dataset of preprocessed cases, None where it lacks one of ours."""
    # Of another dataset's plan the identifier may be the same, the data are not.
    if inputs.preprocessed is None or plan.plans.get("dataset_name") != inputs.raw.name:
        return None
    folder = inputs.preprocessed / plan.chosen.data_identifier
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    kind = infer_dataset_class(str(folder))
    complete = set(inputs.cases) <= set(kind.get_identifiers(str(folder)))
    return kind(str(folder)) if complete else None


def _prepare(case: Case, raw: RawDataset, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return image and labels (channel, z, y, x), read strictly and preprocessed."""
    reader, chosen = plan.manager.image_reader_writer_class(), plan.chosen
    ignore = _label_manager(raw).ignore_label
    declared = {0, *class_names(raw), *([] if ignore is None else [ignore])}
    try:
        image, properties = images.read_images(case.images, reader, len(raw.channels))
        labels = images.read_label_array(case.label, reader, declared)[0]
        labels = _in_order_of(case, reader, labels)
        if labels.shape != image.shape[1:]:
            size = f"{labels.shape}, its image {image.shape[1:]}"
            raise ImageError(case.label, "not of its image's size", size)
        given = (image, labels[None].astype(np.float32), properties)
        preprocessor = chosen.preprocessor_class(verbose=False)
        with contextlib.redirect_stdout(None):
            data, segmentation, _ = preprocessor.run_case_npy(
                *given, plan.manager, chosen, raw.description
            )
    except Exception as error:  # whatever a preprocessor raises
        reason = str(error) if isinstance(error, PluginError) else last_line(error)
        raise PluginError(
            f"Case {case.name} of {raw.name} cannot be prepared: {reason} Or take others: --names"
        ) from error
    return data, segmentation


def _in_order_of(case: Case, reader: Any, labels: np.ndarray) -> np.ndarray:
    """Return labels (z, y, x) in the order of the image's voxels, where they are stored in another
    (RAS against LPS); raise ImageError if they do not have the image's voxels."""
    if ending_of(case.label) in (*PICTURES, *TIFF):
        return labels
    try:
        grid, wanted = map(images.read_geometry, (case.label, case.images[0]))
    except ImageError as error:
        if error.reason == images.SKEWED:
            return labels
        raise
    if grid.agrees(wanted):
        return labels
    turned = on_grid_of(images.read_label_map(case.label), images.read_image(case.images[0]))
    if turned is None:
        raise ImageError(case.label, "not on its image's voxels", f"{grid}; image {wanted}")
    # That reader turns both itself.
    by_reader = type(reader).__name__.endswith("Reorient")
    return labels if by_reader else np.asarray(sitk.GetArrayFromImage(turned))
