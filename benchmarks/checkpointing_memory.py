"""Peak memory of a training step with each setting of activation checkpointing, measured on the CPU
beside the estimate.

    python benchmarks/checkpointing_memory.py --out benchmarks/results/checkpointing_memory_cpu.json

STU-Nets of width 8, of which the activations take most of the memory, in float32; what is measured
is said in ``measure_step.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from measure_step import SEED, allocation_peak, build_loss, storage_bytes
from torch import nn

from stunet_plugin.networks.checkpointing_settings import SETTINGS
from stunet_plugin.networks.memory import PUBLISHED_STRIDES, STUNetShape
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.networks.topology import stage_shapes

WIDTH = 8
PATCH = (64, 64, 64)
CASES = ((1, 3), (2, 3), (3, 3), (2, 105))
"""Blocks per stage, and outputs."""


def measured_peak(shape: STUNetShape, setting: str, patch: tuple[int, ...]) -> int:
    """Return the peak in bytes of a training step with one sample, the optimizer's momentum
    included."""
    torch.manual_seed(SEED)
    stages = len(shape.features)
    network = STUNet(
        *(
            shape.input_channels,
            shape.output_channels,
            stages,
            shape.features,
            nn.Conv3d,
            3,
            shape.strides,
            shape.blocks,
        ),
        *(shape.blocks[-2::-1], True),
    )
    network.apply(network.initialize)
    network.checkpointing = setting
    loss = build_loss(stages - 1, compiled=False)
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True
    )
    data = torch.randn(1, shape.input_channels, *patch)
    outputs = stage_shapes(patch, shape.strides)[:-1]
    targets = [
        torch.randint(shape.output_channels, (1, 1, *output), dtype=torch.int16)
        for output in outputs
    ]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(network(data), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    return storage_bytes([*network.parameters(), *momentum, data, *targets]) + allocation_peak(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    out = parser.parse_args().out
    rows = []
    for blocks, outputs in CASES:
        preset = dataclasses.replace(get_preset("tiny"), width=WIDTH, blocks=blocks)
        shape = STUNetShape.of_preset(preset, PUBLISHED_STRIDES, 1, outputs)
        for setting in SETTINGS:
            estimate = shape.training_memory(
                PATCH, 1, mixed_precision=False, checkpointing=setting
            ).total
            peak = measured_peak(shape, setting, PATCH)
            rows.append(
                {
                    "blocks": blocks,
                    "outputs": outputs,
                    "setting": setting,
                    "peak_bytes": peak,
                    "estimate_bytes": estimate,
                }
            )
            print(
                f"{blocks} blocks, {outputs:3d} outputs, {setting:5}: {peak / 2**20:7.1f} MiB,"
                f" estimate {estimate / 2**20:7.1f}"
            )
    host = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    content = {"width": WIDTH, "patch": PATCH, "batch": 1, **host, "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
