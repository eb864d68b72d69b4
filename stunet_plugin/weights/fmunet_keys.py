"""Parameter names of the published FMUNet, translated to ours. Pure functions from a state dict to
a state dict.

Published names (PyMIC checkpoints; l level, u unit): ``project``,
    ``encoder.{en_convL.conv_list.U,downL.down}``,
``decoder.{upcatL.up,upcatL.conv,de_convL.conv_list.U}``, ``out_layers.L``, and in each the position
of norm and convolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stunet_plugin.networks.anisotropy import NUM_LEVELS
from stunet_plugin.networks.fmunet import DEPTH
from stunet_plugin.weights.key_tables import numbered, translate

NETWORK = "FMUNet"


def _modules() -> dict[str, str]:
    unit, residual = {0: "norms.0", 2: "conv"}, {0: "norms.0", 3: "conv"}
    modules = {"project": "encoder.stages.0.0"}
    for level in range(NUM_LEVELS):
        step = NUM_LEVELS - 2 - level
        block = f"decoder.blocks.{step}" if step >= 0 else "decoder.bottom"
        for depth in range(DEPTH):
            modules |= numbered(
                f"encoder.en_conv{level}.conv_list.{depth}",
                f"encoder.stages.{level}.1.units.{depth}",
                residual,
            )
            modules |= numbered(
                f"decoder.de_conv{level}.conv_list.{depth}", f"{block}.units.{depth}", residual
            )
        if step >= 0:
            modules |= numbered(f"encoder.down{level}.down", f"encoder.stages.{level + 1}.0", unit)
            modules |= numbered(f"decoder.upcat{level}.up", f"decoder.ups.{step}.0", unit)
            modules |= numbered(f"decoder.upcat{level}.conv", f"decoder.merges.{step}", unit)
            modules |= numbered(f"out_layers.{level}", f"decoder.seg_layers.{step}", unit)
    return modules


_MODULES = _modules()


def translate_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under our names; nothing is copied.

    Raises:
        PluginError: a name is not one of the published FMUNet's.
    """
    return dict(
        pair
        for key, value in published.items()
        for pair in translate(key, value, _MODULES, NETWORK)
    )
