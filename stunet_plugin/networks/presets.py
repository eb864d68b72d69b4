"""Presets: the published sizes of all networks. Imports nothing heavy.

Every number of a size is here and nowhere else. Sources: STU-Net, arXiv:2304.06716 (table 1) and
the checkpoints ``{small,base,large,huge}_ep4k``; MIS-FM, arXiv:2306.16925, and its weights;
SAM-Med2D, arXiv:2308.16184, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stunet_plugin.networks.anisotropy import AnisotropyMode

NUM_STAGES = 6
WIDTH_MULTIPLIERS = (1, 2, 4, 8, 16, 16)
"""Channels of each stage as multiples of the base width."""
REFERENCE_INPUT_CHANNELS, REFERENCE_OUTPUT_CHANNELS = 1, 105
"""Of STU-Net's published parameter counts: CT; 104 TotalSegmentator classes and the background."""
PRETEXT_OUTPUTS = 5
"""Of the weights of MIS-FM: four classes of Volume Fusion and the background."""


@dataclass(frozen=True)
class STUNetPreset:
    """One size of STU-Net."""

    name: str  # what users type, as in ``STUNetTrainer_base``
    width: int  # channels of the first stage
    blocks: int  # residual blocks of every encoder and decoder stage
    parameters: int  # published (tiny: computed) at 1 input channel and 105 outputs
    gpu_memory_gb: float  # default of the planner's ``-gpu_memory_target``
    paper_tera_flops: float | None  # at 128^3, a multiply-add counted once

    @property
    def features_per_stage(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in WIDTH_MULTIPLIERS)

    @property
    def blocks_per_stage(self) -> tuple[int, ...]:
        return (self.blocks,) * NUM_STAGES


PRESETS: dict[str, STUNetPreset] = {
    preset.name: preset
    for preset in (
        STUNetPreset("tiny", 4, 1, 924_381, 2, None),  # for tests and dry runs
        STUNetPreset("small", 16, 1, 14_596_941, 8, 0.13),
        STUNetPreset("base", 32, 1, 58_262_669, 16, 0.51),
        STUNetPreset("large", 64, 2, 440_302_605, 40, 3.81),
        STUNetPreset("huge", 96, 3, 1_457_326_221, 80, 12.60),
    )
}
DEFAULT_SIZE = "base"  # of the published ``STUNetTrainer`` without a suffix


@dataclass(frozen=True)
class MISFMPreset:
    """A network of MIS-FM, in its three anisotropy modes."""

    name: str  # what users type, as in ``PCTNetTrainer``
    class_name: str  # dotted path that a plans file names
    parameters: tuple[int, int, int]  # of ours in each mode at 1 input channel and 5 outputs
    weights: str  # name of the published file
    gpu_memory_gb: float = 8.0

    @property
    def planner(self) -> str:
        return f"{self.name}Planner"

    @property
    def plans(self) -> str:
        return f"{self.name}Plans"

    def architecture(self, mode: AnisotropyMode) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plans file for one mode."""
        # The strides follow from the mode; nnU-Net reads them for its deep-supervision scales.
        kwargs = {"mode": mode.number, "strides": [list(stage) for stage in mode.strides]}
        return {
            "network_class_name": self.class_name,
            "arch_kwargs": kwargs,
            "_kw_requires_import": [],
        }


PCTNET = MISFMPreset(
    "PCTNet",
    "stunet_plugin.networks.pctnet.PCTNet",
    (44_265_454, 44_198_206, 43_904_062),
    "pctnet_ct10k_volf.pt",
)
FMUNET = MISFMPreset(
    "FMUNet",
    "stunet_plugin.networks.fmunet.FMUNet",
    (47_371_572, 47_220_660, 46_625_076),
    "fmunet_abk1k_volf.pt",
)
MISFM_PRESETS = (PCTNET, FMUNET)


@dataclass(frozen=True)
class SAMPreset:
    """One size of SAM-Med2D: SAM for small images, with an adapter in every block of its encoder.

    Attributes:
        image_size: pixels per side of what the network sees.
        global_blocks: of the encoder, attend to all tokens; the others to windows of ``window``.
        embedding: channels of an embedded image, of a prompt, and of the decoder.
        adapters: parameters of the adapters, of the ``parameters`` in all.
    """

    name: str
    image_size: int
    width: int
    blocks: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    embedding: int
    decoder_heads: int
    decoder_mlp: int
    parameters: int
    adapters: int
    patch_size: int = 16

    @property
    def tokens(self) -> int:
        """Per side of the image."""
        return self.image_size // self.patch_size

    @property
    def mask_size(self) -> int:
        """Pixels per side of the masks that the decoder gives, and takes as prompts."""
        return self.tokens * 4


SAM_PRESETS: dict[str, SAMPreset] = {
    preset.name: preset
    for preset in (
        SAMPreset("tiny", 64, 48, 3, 4, 3, (1,), 32, 4, 64, 352_004, 176_544),  # for tests
        SAMPreset(
            "vit_b", 256, 768, 12, 12, 14, (2, 5, 8, 11), 256, 8, 2048, 271_241_776, 180_504_576
        ),
    )
}


@dataclass(frozen=True)
class UNETRPreset:
    """A size of UNETR, with pruned tokens or without."""

    size: str
    width: int
    depth: int
    heads: int
    features: int  # of the decoder at full resolution
    gpu_memory_gb: float
    ratio: float | None = None  # of the tokens left, that leaves at each cut; None prunes nothing

    class_name = "stunet_plugin.networks.unetr.UNETR"

    @property
    def suffix(self) -> str:
        """What stands behind ``UNETRTrainer`` and ``UNETRPlans``; the base size has no name."""
        size = "" if self.size == DEFAULT_SIZE else f"_{self.size}"
        return size + ("" if self.ratio is None else "_STP")

    @property
    def name(self) -> str:
        return f"UNETR{self.suffix}"

    def architecture(
        self, strides: Sequence[Sequence[int]], patch: Sequence[int]
    ) -> dict[str, Any]:
        """Return the ``architecture`` entry of a plans file."""
        kwargs = {
            "patch_size": [int(size) for size in patch],
            "strides": [list(stage) for stage in strides],
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "features": self.features,
            "pruning": None if self.ratio is None else {"after": [3, 6, 9], "ratio": self.ratio},
        }
        return {
            "network_class_name": self.class_name,
            "arch_kwargs": kwargs,
            "_kw_requires_import": [],
        }


UNETR_SIZES = (
    UNETRPreset("tiny", 48, 12, 4, 4, 2),  # for tests and dry runs
    UNETRPreset("small", 192, 12, 6, 8, 8),
    UNETRPreset("base", 768, 12, 12, 16, 16),  # as published
)
STP_RATIO = 0.75
"""As published for BraTS: a quarter of the tokens left stays at each of three cuts."""
UNETR_PRESETS = (*UNETR_SIZES, *(replace(size, ratio=STP_RATIO) for size in UNETR_SIZES))


def find_preset(features: tuple[int, ...], blocks: tuple[int, ...]) -> STUNetPreset | None:
    """Return the size with these widths and encoder depths, None if it is not published."""
    sizes = {(one.features_per_stage, one.blocks_per_stage): one for one in PRESETS.values()}
    return sizes.get((features, blocks))
