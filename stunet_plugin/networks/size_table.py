"""The table that ``stunet list`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.checkpointing_settings import SETTINGS
from stunet_plugin.networks.memory import GIGABYTE, STUNetShape
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.topology import strides_for_patch, total_stride


def size_table(
    patch_size: Sequence[int], batch_size: int, input_channels: int, output_channels: int
) -> str:
    """Return parameters, FLOPs and training memory of every size as text.

    Args:
        patch_size: voxels on three axes, pooled as far as it allows (see strides_for_patch).
        batch_size, input_channels, output_channels: of the training, each at least 1.

    Raises:
        PluginError: the patch cannot be pooled, or a number is smaller than 1.
    """
    for name, value in (
        ("--batch-size", batch_size),
        ("--channels", input_channels),
        ("--classes", output_channels),
    ):
        if value < 1:
            raise PluginError(f"{name} must be at least 1, not {value}.")
    strides = strides_for_patch(patch_size)
    patch = "x".join(map(str, patch_size))
    lines = [
        f"{'size':<7}{'width':>6}{'blocks':>8}{'parameters':>15}{'TFLOPs':>9}{'memory':>10}{'least':>10}"
        "  planner default"
    ]
    for preset in PRESETS.values():
        shape = STUNetShape.of_preset(preset, strides, input_channels, output_channels)
        peaks = [
            shape.training_memory(patch_size, batch_size, checkpointing=setting).total / GIGABYTE
            for setting in SETTINGS
        ]
        tera = shape.multiply_adds(patch_size) / 1e12
        lines.append(
            f"{preset.name:<7}{preset.width:>6}{preset.blocks:>8}{shape.parameters():>15,}{tera:>9.2f}{peaks[0]:>7.1f}"
            f" GB{min(peaks):>7.1f} GB{preset.gpu_memory_gb:>8g} GB"
        )
    reduced = "x".join(map(str, total_stride(strides)))
    lines += [
        "",
        (
            f"At patch {patch} (reduced by {reduced}), batch {batch_size}, {input_channels}"
            f" channel(s), {output_channels} outputs."
        ),
        (
            "FLOPs: forward pass of one patch, a multiply-add counted once, as in the paper."
            " Memory: estimated peak of a training"
        ),
        (
            "step on CUDA with AMP; with many outputs most of it is the loss. Least: with"
            " activation checkpointing, which large and"
        ),
        (
            "huge switch on where it is needed (STUNET_CHECKPOINTING). The planner's default is"
            " what STUNetPlanner_<size> fits patch"
        ),
        "and batch to. Sources: arXiv:2304.06716 and the published checkpoints; tiny is for tests.",
    ]
    return "\n".join(lines)
