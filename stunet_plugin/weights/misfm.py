"""PCT-Net and FMUNet weights, read from checkpoints of PyMIC (the published ones) or of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import fmunet, pctnet
from stunet_plugin.networks.anisotropy import MODE_PURPOSES, MODES, NUM_LEVELS
from stunet_plugin.networks.presets import FMUNET, PCTNET, MISFMPreset
from stunet_plugin.weights import identify, misfm_keys
from stunet_plugin.weights.identify import HEADS, Origin
from stunet_plugin.weights.tensors import check_convolutions, plain_tensors

PRESETS: dict[Origin, MISFMPreset] = {
    **dict.fromkeys((Origin.PCTNET, Origin.OWN_PCTNET), PCTNET),
    **dict.fromkeys((Origin.FMUNET, Origin.OWN_FMUNET), FMUNET),
}

# Where the width of each level shows, the mode, and the attention heads of levels 2 to 4.
_STEM = "encoder.stages.0.0.weight"
_FIRST = {PCTNET: "1.conv.weight", FMUNET: "0.conv.weight"}
_KERNEL = {PCTNET: "1.conv.weight", FMUNET: "1.units.0.conv.weight"}
_TABLE = "2.transformer.blocks.0.attention.relative_position_bias_table"
_LAST_HEAD = f"decoder.seg_layers.{NUM_LEVELS - 2}.conv.weight"


def read_misfm(
    origin: Origin, checkpoint: Mapping[str, Any], weights: dict[str, Any], wanted: int | None
) -> identify.NetworkWeights:
    """Read sizes and mode off names and shapes of weights that were identified in a checkpoint. One
    of PyMIC and PCT-Net holds all three modes, so one must be wanted; the kernels tell others'."""
    preset, is_pctnet = PRESETS[origin], PRESETS[origin] is PCTNET
    tensors = _translate(origin, weights, wanted)
    levels = range(1, NUM_LEVELS)
    widths = (_STEM, *(f"encoder.stages.{level}.{_FIRST[preset]}" for level in levels))
    kernels = (_STEM, f"encoder.stages.1.{_KERNEL[preset]}")
    tables = [f"encoder.stages.{level}.{_TABLE}" for level in levels[1:]] if is_pctnet else []
    heads = [name for name in tensors if HEADS in name]
    check_convolutions(tensors, (*widths, *kernels, *((_LAST_HEAD,) if heads else ())))
    given = tuple(tuple(tensors[name].shape[2:]) for name in kernels)
    mode = next((mode for mode in MODES if mode.kernel_sizes[:2] == given), None)
    if mode is None:
        raise PluginError(f"the kernels of its first two levels, {given}, fit no mode.")
    if wanted not in (None, mode.number):
        raise PluginError(f"it is of mode {mode.number}, not {wanted}. Leave --mode out.")
    features = tuple(int(tensors[name].shape[0]) for name in widths)
    unfit = [name for name in tables if name not in tensors or tensors[name].ndim != 2]
    if unfit:
        raise PluginError(f"{unfit[0]} is missing, or has not two axes.")
    num_heads = tuple(int(tensors[name].shape[1]) for name in tables)
    # Arguments of the network that are not its defaults.
    changed: dict[str, Any] = {}
    if features != (pctnet.FEATURES if is_pctnet else fmunet.FEATURES):
        changed["features_per_stage"] = list(features)
    if is_pctnet and num_heads != pctnet.NUM_HEADS:
        changed["num_heads"] = list(num_heads)
    size = " of no published size" if changed else ""
    entry = preset.architecture(mode)
    return identify.NetworkWeights(
        origin=origin,
        checkpoint=checkpoint,
        tensors=tensors,
        title=f"{preset.name}{size} in mode {mode.number} (widths {list(features)})",
        preset=preset,
        published_size=not changed,
        mode=mode,
        trainer=f"{preset.name}Trainer",
        plans_like=f"{preset.plans}_like_mode{mode.number}",
        features=features,
        input_weights=(_STEM,),
        # PCT-Net's batch norms have learned the stem's response; FMUNet's residuals pass it on.
        default_stem="mean",
        outputs=int(tensors[_LAST_HEAD].shape[0]) if heads else 0,
        entry={**entry, "arch_kwargs": entry["arch_kwargs"] | changed},
    )


def _translate(origin: Origin, weights: dict[str, Any], wanted: int | None) -> dict[str, Tensor]:
    if origin is not Origin.PCTNET:
        tensors = plain_tensors(weights)
        return misfm_keys.translate_fmunet(tensors) if origin is Origin.FMUNET else tensors
    if wanted is None:
        raise PluginError(
            "it holds the stems and heads of all three anisotropy modes. Choose yours with --mode:"
            f" {MODE_PURPOSES}. PCTNetTrainer prints the mode that it takes for a plan."
        )
    used = plain_tensors(misfm_keys.used_in(weights, wanted))
    return misfm_keys.translate_pctnet(used, wanted)
