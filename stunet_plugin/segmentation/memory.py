"""Memory that a scan needs at least, estimated before it is segmented."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from stunet_plugin.errors import PluginError
from stunet_plugin.inference.slabs import SlabPredictor
from stunet_plugin.utils.memory import GIGABYTE, free_memory

LIBRARIES = 0.9 * GIGABYTE
"""torch, OpenVINO and nnU-Net, once imported."""
IMAGE_COPIES, INPUT_COPIES = 3, 3
"""float32 copies of the image and of the network's input, at the moment with the most of them."""
FIRST_MAPS = 4
"""Feature maps as large as the patch, in widths of the network's first layer, at its last one."""


def least_memory(predictor: SlabPredictor, shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return the bytes that segmenting a scan on the CPU takes at least.

    Args:
        shape: of the images (channel, z, y, x).
        spacing: (z, y, x) in mm.
    """
    configuration = predictor.configuration_manager
    order, own = predictor.plans_manager.transpose_forward, list(configuration.spacing)
    size, image = [shape[1 + axis] for axis in order], [spacing[axis] for axis in order]
    new = compute_new_shape(size, image, own if len(own) == 3 else [image[0], *own])
    patch = [1, *configuration.patch_size][-3:]
    padded = [max(pair) for pair in zip(map(int, new), patch, strict=True)]
    outputs = predictor.label_manager.num_segmentation_heads
    wanted = outputs if predictor.outputs is None else len(predictor.outputs) + 1
    first = next(x for x in predictor.network.parameters() if x.ndim > 3)
    folds = len(predictor.list_of_parameters)
    # Outputs are in half precision, features of the last layer, as wide as the first, in float32.
    features = first.shape[0] * folds + 1
    voxel = 4 * features if 2 * features <= outputs else 2 * wanted
    # Along the longest axis.
    slab = min(patch[axis] * prod(padded) / padded[axis] for axis in range(3)) * voxel
    window = prod(patch) * (FIRST_MAPS * first.shape[0] * 4 + voxel)
    weights = sum(x.numel() for x in predictor.network.parameters()) * 4
    images = IMAGE_COPIES * prod(shape) + INPUT_COPIES * shape[0] * prod(padded)
    return LIBRARIES + images * 4 + slab + window + (folds + 1) * weights


def check_memory(
    predictor: SlabPredictor, name: str, shape: Sequence[int], spacing: Sequence[float]
) -> None:
    """Raise a PluginError if a scan cannot fit into the free memory, and say what would."""
    free = free_memory()
    if free is None or predictor.device.type != "cpu":
        return
    # What is imported and loaded by now is not free any more, and not needed again.
    free += LIBRARIES + sum(x.numel() for x in predictor.network.parameters()) * 4
    needed = least_memory(predictor, shape, spacing)
    if needed <= free:
        return
    image = prod(shape[1:])
    smallest = least_memory(predictor, (shape[0], 1, 1, 1), spacing)
    fits = image * (free - smallest) / (needed - smallest)
    advice = "Take a smaller model, or a machine with more memory."
    if fits > 0:
        advice = (
            f"About {fits / 1e6:,.1f} million voxels would fit: crop the scan. Else compute fewer"
            " --structures, take a smaller model, or a machine with more memory."
        )
    raise PluginError(
        f"{name}: segmenting its {image / 1e6:,.1f} million voxels takes at least"
        f" {needed / GIGABYTE:.1f} GB of memory, and {free / GIGABYTE:.1f} GB are there. {advice}"
    )
