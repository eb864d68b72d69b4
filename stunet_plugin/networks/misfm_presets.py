"""Published sizes of PCT-Net and FMUNet, one frozen record per network and mode. Imports nothing
heavy.

Source: MIS-FM, arXiv:2306.16925, and its published weights; counts at one input channel and five
    outputs (the background and
four classes of the pretext task).
"""

from __future__ import annotations

from dataclasses import dataclass

MODE_PURPOSES = (
    "0 (all axes alike, such as 1 x 1 x 1 mm), 1 (slices about twice as far apart as voxels within"
    " them), 2 (three times or more)"
)
"""What each anisotropy mode is for; their strides are in
:mod:`stunet_plugin.networks.anisotropy`."""

REFERENCE_INPUT_CHANNELS = 1
PRETEXT_OUTPUTS = 5
"""Of the published weights: the four classes of Volume Fusion and the background."""


@dataclass(frozen=True)
class MISFMPreset:
    """One network in one anisotropy mode.

    Attributes:
        network: its class.
        mode: see :mod:`stunet_plugin.networks.anisotropy`.
        parameters: of ours.
        published_parameters: of the published network. PCT-Net's holds the stems and heads of all
            modes, norms that it never uses, and smaller relative position tables where the patch
            that it was built for shrinks a window.
        published_patch: the patch that ``published_parameters`` refers to.
        weights: name of the published weights.
    """

    network: str
    mode: int
    parameters: int
    published_parameters: int
    published_patch: tuple[int, int, int]
    weights: str


PRESETS = tuple(
    MISFMPreset(network, mode, parameters, published, (64, 128, 128), weights)
    for network, mode, parameters, published, weights in (
        ("PCTNet", 0, 44_265_454, 45_257_938, "pctnet_ct10k_volf.pt"),
        ("PCTNet", 1, 44_198_206, 45_289_554, "pctnet_ct10k_volf.pt"),
        ("PCTNet", 2, 43_904_062, 45_289_554, "pctnet_ct10k_volf.pt"),
        ("FMUNet", 0, 47_371_572, 47_371_572, "fmunet_abk1k_volf.pt"),
        ("FMUNet", 1, 47_220_660, 47_220_660, "fmunet_abk1k_volf.pt"),
        ("FMUNet", 2, 46_625_076, 46_625_076, "fmunet_abk1k_volf.pt"),
    )
)
