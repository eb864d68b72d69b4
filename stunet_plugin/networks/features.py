"""Features of a network at voxels of a case: what its segmentation heads take in.

The voxels are chosen first, from the labels; a sliding window then goes only where there are some,
each voxel being read where a window has it nearest to its middle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from stunet_plugin.errors import PluginError

FINEST_SAMPLES, FEWEST_SAMPLES = 400, 100
"""Voxels per class and case at full resolution, and how few it becomes when halved from level to
level (as published)."""


def samples_of_levels(levels: int) -> list[int]:
    """Return the sampled voxels per class and case of each level, the coarsest first."""
    return [max(FINEST_SAMPLES >> step, FEWEST_SAMPLES) for step in range(levels)][::-1]


def sample_voxels(
    segmentation: np.ndarray, labels: Sequence[int], case: str, seed: int
) -> dict[int, np.ndarray]:
    """Draw voxels of each label of a segmentation (z, y, x), without replacement; labels that it
    lacks are left out.

    The draw depends on seed, case and label alone, so that every network is asked about the same
    voxels.

    Returns:
        Label to indices (voxel, 3), at most ``FINEST_SAMPLES``, in random order: the first ones
        serve the coarser levels.
    """
    found = {}
    for label in labels:
        indices = np.flatnonzero(segmentation == label)
        if len(indices):
            rng = np.random.default_rng([seed, crc32(case.encode()), label])
            drawn = rng.choice(indices, min(len(indices), FINEST_SAMPLES), replace=False)
            found[label] = np.stack(np.unravel_index(drawn, segmentation.shape), axis=1)
    return found


def read_features(
    network: nn.Module,
    image: Tensor,
    voxels: Mapping[int, np.ndarray],
    patch_size: Sequence[int],
    step: float,
    heads: Sequence[nn.Module],
) -> list[dict[int, np.ndarray]]:
    """Return the features of sampled voxels at levels of the decoder: what some modules take in.

    At coarser levels a voxel's features are interpolated linearly between those of the level.

    Args:
        network: in evaluation mode, with deep supervision, on the device to compute on.
        image: preprocessed, (channel, z, y, x).
        voxels: label to indices (voxel, 3), see :func:`sample_voxels`.
        patch_size: three or two axes; a 2D network sees slices of the first axis.
        step: of the sliding window, as a fraction of the patch.
        heads: a module per level, the coarsest first: :func:`head_modules`, or in them.

    Returns:
        One entry per level: label to features (voxel, channel), float32.
    """
    axes, patch = len(patch_size), (*(1,) * (3 - len(patch_size)), *patch_size)
    padded, inside = pad_nd_image(image, patch, "constant", {"value": 0}, return_slicer=True)
    counts, counted = samples_of_levels(len(heads)), [len(indices) for indices in voxels.values()]
    points = np.concatenate(list(voxels.values())) + [part.start or 0 for part in inside[1:]]
    rank, label = np.concatenate([np.arange(n) for n in counted]), np.repeat(list(voxels), counted)

    starts = _window_starts(points, padded.shape[1:], patch, step)
    device = next(network.parameters()).device
    inputs: dict[nn.Module, Tensor] = {}

    def remember(head: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[head] = given[0]

    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in heads]
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for head in heads:
            hooks.callback(head.register_forward_pre_hook(remember).remove)
        for start in np.unique(starts, axis=0):
            here = np.flatnonzero((starts == start).all(axis=1))
            box = (slice(first, first + size) for first, size in zip(start, patch, strict=True))
            window = padded[(slice(None), *box)].to(device)
            network(window[None] if axes == 3 else window[None, :, 0])
            for of_level, head, count in zip(found, heads, counts, strict=True):
                mine = here[rank[here] < count]
                places = torch.from_numpy((points[mine] - start + 0.5) / patch)[:, -axes:]
                of_level.append((mine, _interpolate(inputs[head], places.float().to(device))))
    features = []
    for of_level, count in zip(found, counts, strict=True):
        order, values = (np.concatenate(parts) for parts in zip(*of_level, strict=True))
        sorted_values, of_value = values[np.argsort(order)], label[rank < count]
        features.append({value: sorted_values[of_value == value] for value in voxels})
    return features


def _interpolate(features: Tensor, places: Tensor) -> np.ndarray:
    """Return features (1, channel, *spatial) at places (place, axis), fractions of the window, as
    (place, channel)."""
    # grid_sample counts from -1 to 1 and from the last axis to the first; this is the rule of
    # torch's interpolate.
    grid = (2 * places - 1).flip(1)
    grid = grid.view(1, *(1,) * (grid.shape[1] - 1), *grid.shape)
    if features.device.type == "mps":  # torch has no 3D grid_sample for it
        features, grid = features.cpu(), grid.cpu()
    values = functional.grid_sample(
        features.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return np.asarray(values[0].flatten(1).T.cpu())


def _window_starts(
    points: np.ndarray, size: Sequence[int], patch: Sequence[int], step: float
) -> np.ndarray:
    """For each point (point, 3) the first corner of the window that has it nearest its middle."""
    # Along an axis with windows of one voxel (the slices of 2D networks) every voxel has its own.
    grid = compute_steps_for_sliding_window(tuple(size), tuple(patch), step)
    nearest = []
    for axis, first in enumerate(grid):
        firsts = np.arange(size[axis]) if patch[axis] == 1 else np.array(first)
        middles = firsts + (patch[axis] - 1) / 2
        nearest.append(firsts[np.abs(points[:, axis, None] - middles).argmin(axis=1)])
    return np.stack(nearest, axis=1)


def head_modules(network: nn.Module) -> list[nn.Module]:
    """Return the segmentation heads of a network, the coarsest first; raise PluginError if it has
    none where nnU-Net's networks have them."""
    heads = getattr(getattr(network, "decoder", None), "seg_layers", None)
    if not isinstance(heads, nn.ModuleList) or not len(heads):
        raise PluginError(
            f"{type(network).__name__} has no segmentation heads in decoder.seg_layers, so there"
            " are no levels to compare or fit. Take networks of this plugin, or nnU-Net's U-Nets."
        )
    return list(heads)


def last_convolution(head: nn.Module) -> _ConvNd:
    """Return the convolution that makes the logits: the head itself, or the one in it that comes
    after norm and activation; raise PluginError if there are more."""
    found = [module for module in head.modules() if isinstance(module, _ConvNd)]
    if len(found) != 1:
        raise PluginError(
            f"A segmentation head with {len(found)} convolutions cannot be fitted. Start it at"
            " random: STUNET_HEADS=random"
        )
    return found[0]
