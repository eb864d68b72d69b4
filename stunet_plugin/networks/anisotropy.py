"""Anisotropy modes of PCT-Net and FMUNet: three, and which of them suits a plan.

Source: MIS-FM, arXiv:2306.16925, and its published code (github.com/openmedlab/MIS-FM). Both
networks have five levels. In mode 1 the first pooling, in mode 2 the first two leave axis 0
(through-plane, the coarse one after nnU-Net's transpose) as it is, and the levels above such a
pooling convolve in-plane only. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import total_stride

NUM_LEVELS = 5
DIMENSIONS = 3

Triple = tuple[int, int, int]

_IN_PLANE: Triple = (1, 2, 2)
_ALL_AXES: Triple = (2, 2, 2)

MODE_PURPOSES = (
    "0 (all axes alike, such as 1 x 1 x 1 mm), 1 (slices about twice as far apart as voxels within"
    " them), 2 (three times or more)"
)
USE_FOR_2D = "It is a 3D network: use a 3D configuration (3d_fullres), or STUNetTrainer for 2d."


@dataclass(frozen=True)
class AnisotropyMode:
    """``number`` is the published ``resolution_mode``: how many poolings leave axis 0 as it is;
    ``strides`` are of each level, full resolution first, as nnU-Net counts them."""

    number: int
    strides: tuple[Triple, ...]

    @property
    def reduction(self) -> tuple[int, ...]:
        """By how much each axis shrinks on the way down; a patch must be divisible by it."""
        return total_stride(self.strides)

    @property
    def kernel_sizes(self) -> tuple[Triple, ...]:
        """One per level: in-plane where the pooling below the level is, else 3 on every axis."""
        below = (*self.strides[1:], _ALL_AXES)
        return tuple((1, 3, 3) if stride == _IN_PLANE else (3, 3, 3) for stride in below)


MODES = tuple(
    AnisotropyMode(
        number, ((1, 1, 1), *[_IN_PLANE] * number, *[_ALL_AXES] * (NUM_LEVELS - 1 - number))
    )
    for number in range(3)
)


def get_mode(number: int) -> AnisotropyMode:
    if not isinstance(number, bool) and number in range(len(MODES)):
        return MODES[number]
    raise PluginError(f"Unknown anisotropy mode {number!r}. Modes: {MODE_PURPOSES}.")


def choose_mode(spacing: Sequence[float], patch_size: Sequence[int]) -> tuple[AnisotropyMode, str]:
    """Choose the mode for a plan; return it and the reason in one sentence.

    1. By spacing (mm, axis 0 the coarse one): in-plane poolings, each of which halves the ratio of
       axis 0 to the finest of the others, bring it closest to 1. Mode 0 below sqrt 2, mode 1 up to
       2 sqrt 2, mode 2 above.
    2. By patch: if the mode's reduction does not divide it, or would leave a single voxel on axis
       0, the first higher mode without that fault (failing that, the first that divides it).

    If no mode takes the patch: the one that suits the spacing.
    """
    if len(spacing) != DIMENSIONS or not all(0 < step < math.inf for step in spacing):
        raise PluginError(
            f"Spacing must be three positive numbers of millimetres, not {list(spacing)}. Plan"
            f" again. {USE_FOR_2D}"
        )
    ratio = spacing[0] / min(spacing[1:])
    suited = MODES[min(max(round(math.log2(ratio)), 0), len(MODES) - 1)]
    because = f"the spacing on axis 0 is {ratio:.2f} times the finest in-plane one"

    dividing = [
        mode
        for mode in MODES[suited.number :]
        if all(n and n % step == 0 for n, step in zip(patch_size, mode.reduction, strict=True))
    ]
    deep = [mode for mode in dividing if patch_size[0] > mode.reduction[0]]
    chosen = next(iter([*deep, *dividing, suited]))
    if chosen == suited:
        return chosen, f"Mode {chosen.number}, because {because}."
    fault = "leave a single voxel of" if suited in dividing else "not divide"
    return chosen, (
        f"Mode {chosen.number}: {because}, which suits mode {suited.number}, but that would {fault}"
        f" the patch {list(patch_size)} (it reduces axis 0 by {suited.reduction[0]}, mode"
        f" {chosen.number} by {chosen.reduction[0]})."
    )
