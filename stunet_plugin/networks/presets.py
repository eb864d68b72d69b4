"""The published sizes of STU-Net, one frozen record each. Every number of a size stands here and
nowhere else.

Source: Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models
    Empowered by Large-Scale
Supervised Pre-training", arXiv:2304.06716 (table 1), and the published checkpoints
``{small,base,large,huge}_ep4k``.
This module imports nothing heavy: ``stunet --help`` and ``stunet list`` read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stunet_plugin.errors import PluginError, did_you_mean

NUM_STAGES = 6
"""Resolution stages of the published topology: one at full resolution and five behind a pooling
each."""

WIDTH_MULTIPLIERS = (1, 2, 4, 8, 16, 16)
"""Channels of each stage as multiples of the base width."""

REFERENCE_INPUT_CHANNELS = 1
REFERENCE_OUTPUT_CHANNELS = 105
"""What the published parameter counts refer to: one CT channel, 104 TotalSegmentator classes and
the background."""


@dataclass(frozen=True)
class STUNetPreset:
    """One size of STU-Net.

    Attributes:
        name: what users type, as in ``STUNetTrainer_base``.
        width: channels of the first stage.
        blocks: residual blocks of every encoder and decoder stage.
        parameters: published (or, for ``tiny``, computed) count at 1 input channel and 105 outputs.
        gpu_memory_gb: default of the planner's ``-gpu_memory_target`` for this size.
        paper_tera_flops: FLOPs at 128^3 as the paper states them (one multiply-add counted once);
            None if unpublished.
        source: where the numbers come from.
    """

    name: str
    width: int
    blocks: int
    parameters: int
    gpu_memory_gb: float
    paper_tera_flops: float | None
    source: str

    @property
    def features_per_stage(self) -> tuple[int, ...]:
        """Channels of the six stages, full resolution first."""
        return tuple(self.width * multiplier for multiplier in WIDTH_MULTIPLIERS)

    @property
    def blocks_per_stage(self) -> tuple[int, ...]:
        """Residual blocks of the six encoder stages."""
        return (self.blocks,) * NUM_STAGES


PRESETS: dict[str, STUNetPreset] = {
    preset.name: preset
    for preset in (
        STUNetPreset("tiny", 4, 1, 924_381, 2, None, "this project, for tests and dry runs"),
        STUNetPreset("small", 16, 1, 14_596_941, 8, 0.13, "arXiv:2304.06716, small_ep4k.model"),
        STUNetPreset("base", 32, 1, 58_262_669, 16, 0.51, "arXiv:2304.06716, base_ep4k.model"),
        STUNetPreset("large", 64, 2, 440_302_605, 40, 3.81, "arXiv:2304.06716, large_ep4k.model"),
        STUNetPreset("huge", 96, 3, 1_457_326_221, 80, 12.60, "arXiv:2304.06716, huge_ep4k.model"),
    )
}

DEFAULT_SIZE = "base"
"""What the published ``STUNetTrainer`` without a suffix trains."""


def get_preset(name: str) -> STUNetPreset:
    """Return the preset called ``name``.

    Raises:
        PluginError: the size is unknown; the message names the known ones and the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise PluginError(
        f"Unknown STU-Net size {name!r}. Sizes: {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
    )


def find_preset(
    features_per_stage: tuple[int, ...], blocks_per_stage: tuple[int, ...]
) -> STUNetPreset | None:
    """Return the preset with these widths and encoder depths, or None if they are no published
    size."""
    for preset in PRESETS.values():
        if (
            preset.features_per_stage == features_per_stage
            and preset.blocks_per_stage == blocks_per_stage
        ):
            return preset
    return None
