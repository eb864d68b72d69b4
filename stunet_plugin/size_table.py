"""The table that ``stunet list`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from stunet_plugin.cost import GIGABYTE, PUBLISHED_STRIDES, STUNetShape
from stunet_plugin.errors import PluginError
from stunet_plugin.presets import PRESETS
from stunet_plugin.topology import check_patch_size


def size_table(patch_size: Sequence[int], batch_size: int, input_channels: int, output_channels: int) -> str:
    """Return parameters, FLOPs and training memory of every size as text.

    Args:
        patch_size: voxels on three axes, divisible by 32 (five poolings).
        batch_size, input_channels, output_channels: of the training, each at least 1.

    Raises:
        PluginError: the patch does not fit five poolings, or a number is smaller than 1.
    """
    for name, value in (("--batch-size", batch_size), ("--channels", input_channels), ("--classes", output_channels)):
        if value < 1:
            raise PluginError(f"{name} must be at least 1, not {value}.")
    check_patch_size(patch_size, PUBLISHED_STRIDES, "STU-Net with its five poolings by two")
    patch = "x".join(map(str, patch_size))
    lines = [
        f"{'size':<7}{'width':>6}{'blocks':>8}{'parameters':>15}{'TFLOPs':>9}{'memory':>10}  planner default",
    ]
    for preset in PRESETS.values():
        shape = STUNetShape.of_preset(preset, input_channels=input_channels, output_channels=output_channels)
        memory = shape.training_memory(patch_size, batch_size).total / GIGABYTE
        tera = shape.multiply_adds(patch_size) / 1e12
        lines.append(
            f"{preset.name:<7}{preset.width:>6}{preset.blocks:>8}{shape.parameters():>15,}{tera:>9.2f}{memory:>7.1f} GB"
            f"{preset.gpu_memory_gb:>8g} GB"
        )
    lines += [
        "",
        f"At patch {patch}, batch {batch_size}, {input_channels} channel(s), {output_channels} outputs. FLOPs: forward pass of one "
        f"patch, a multiply-add",
        "counted once, as in the paper. Memory: estimated peak of a training step on CUDA with AMP. Sources: arXiv:2304.06716",
        "and the published checkpoints; tiny is for tests.",
    ]
    return "\n".join(lines)
