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
"""What each mode is for."""

USE_FOR_2D = "It is a 3D network: use a 3D configuration (3d_fullres), or STUNetTrainer for 2d."
"""What PCT-Net and FMUNet answer to two axes."""


@dataclass(frozen=True)
class AnisotropyMode:
    """Strides and kernels of one mode.

    Attributes:
        number: 0, 1 or 2, the published ``resolution_mode``: how many poolings leave axis 0 as it
            is.
        strides: one per level, full resolution first, as nnU-Net counts them (the first all ones).
    """

    number: int
    strides: tuple[Triple, ...]

    @property
    def reduction(self) -> tuple[int, ...]:
        """By how much each axis shrinks from the input to the deepest level; a patch must be
        divisible by it."""
        return total_stride(self.strides)

    @property
    def kernel_sizes(self) -> tuple[Triple, ...]:
        """One per level: in-plane where the pooling below the level is in-plane, else 3 on every
        axis."""
        below = (*self.strides[1:], _ALL_AXES)
        return tuple((1, 3, 3) if stride == _IN_PLANE else (3, 3, 3) for stride in below)


MODES = tuple(
    AnisotropyMode(
        number, ((1, 1, 1), *[_IN_PLANE] * number, *[_ALL_AXES] * (NUM_LEVELS - 1 - number))
    )
    for number in range(3)
)


def get_mode(number: int) -> AnisotropyMode:
    """Return the mode with this number.

    Raises:
        PluginError: there is none; the message says which there are and what each is for.
    """
    if not isinstance(number, bool) and number in range(len(MODES)):
        return MODES[number]
    raise PluginError(f"Unknown anisotropy mode {number!r}. Modes: {MODE_PURPOSES}.")


def choose_mode(spacing: Sequence[float], patch_size: Sequence[int]) -> tuple[AnisotropyMode, str]:
    """Choose the mode for a plan.

    The rule, in this order:

    1. By spacing. Each in-plane pooling halves the ratio of the spacing on axis 0 to the finest of
       the others; take the number of them that brings it closest to 1 on a logarithmic scale:
       mode 0 below a ratio of 1.41 (sqrt 2), mode 1 up to 2.83 (2 sqrt 2), mode 2 above.
    2. By patch. A higher mode reduces axis 0 less. If the mode's reduction does not divide the
       patch, or would leave a single voxel on axis 0, the first higher mode without that fault
       is taken (failing that, the first that divides the patch).

    If no mode takes the patch, the one that suits the spacing is returned; ``check_patch_size``
    then names patch sizes that work.

    Args:
        spacing: of the plan in mm, in nnU-Net's transposed order (axis 0 is the coarse one).
        patch_size: voxels per axis, in the same order.

    Returns:
        The mode and the reason in one sentence.

    Raises:
        PluginError: not three axes, or a spacing that is not positive.
    """
    if len(spacing) != DIMENSIONS or len(patch_size) != DIMENSIONS:
        raise PluginError(
            f"A mode is chosen from three axes, not from spacing {list(spacing)} and patch size"
            f" {list(patch_size)}. {USE_FOR_2D}"
        )
    if not all(step > 0 and math.isfinite(step) for step in spacing):
        raise PluginError(
            f"Spacing must be positive numbers of millimetres, not {list(spacing)}. Plan again."
        )
    ratio = spacing[0] / min(spacing[1:])
    suited = min(max(round(math.log2(ratio)), 0), len(MODES) - 1)
    because = f"the spacing on axis 0 is {ratio:.2f} times the finest in-plane one"

    dividing = [mode for mode in MODES[suited:] if _divides(mode, patch_size)]
    chosen = next(
        (mode for mode in dividing if patch_size[0] > mode.reduction[0]),
        dividing[0] if dividing else MODES[suited],
    )
    if chosen.number == suited:
        return chosen, f"Mode {chosen.number}, because {because}."
    fault = "leave a single voxel of" if MODES[suited] in dividing else "not divide"
    return chosen, (
        f"Mode {chosen.number}: {because}, which suits mode {suited}, but that would {fault} the"
        f" patch {list(patch_size)} (it reduces axis 0 by {MODES[suited].reduction[0]}, mode"
        f" {chosen.number} by {chosen.reduction[0]})."
    )


def _divides(mode: AnisotropyMode, patch_size: Sequence[int]) -> bool:
    return all(
        size >= step and size % step == 0
        for size, step in zip(patch_size, mode.reduction, strict=True)
    )
