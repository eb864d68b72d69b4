"""Cost of network options: parameters, operations and memory of each beside its plain twin.

    python benchmarks/network_options.py --sizes tiny --patch 64

Makes the table of docs/network_options.md. Memory is the peak of a process that makes one training
step in float32 on the CPU, less what it had before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stunet_plugin.networks.from_plan import Resolved, stunet_architecture, with_options
from stunet_plugin.networks.presets import PRESETS, UNETR_SIZES
from stunet_plugin.networks.topology import strides_for_patch, token_strides

OUTPUTS, BATCH = 5, 2
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    )
}
"""Which torch does not count."""
RATIOS = (0.0, 0.5, 0.75, 0.9)
"""Of pruned tokens, beside none (the plain network)."""


def architectures(size: str, patch: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Return ``architecture`` entries of plans by name, plain networks first."""
    plain = stunet_architecture(PRESETS[size], strides_for_patch(patch))

    def stunet(**options: Any) -> dict[str, Any]:
        return with_options(Resolved(plain), options, patch, "the benchmark").architecture

    found = {
        f"STUNet {size}": plain,
        f"STUNet {size} GRC": stunet(grc={}),
        f"STUNet {size} SPM": stunet(spm={}),
        f"STUNet {size} SPM, no prior": stunet(spm={"prior": False}),
    }
    preset = next(one for one in UNETR_SIZES if one.size == size)
    unetr = preset.architecture(token_strides((1.0,) * len(patch), patch), patch)
    found[f"UNETR {size}"] = unetr
    for ratio in RATIOS:
        pruning = {"after": [3, 6, 9], "ratio": ratio}
        kwargs = {**unetr["arch_kwargs"], "pruning": pruning}
        found[f"UNETR {size} STP {ratio:g}"] = {**unetr, "arch_kwargs": kwargs}
    return found


def build(architecture: dict[str, Any], device: str = "cpu") -> nn.Module:
    with torch.device(device):
        network: nn.Module = get_network_from_plans(
            *architecture.values(), 1, OUTPUTS, allow_init=False, deep_supervision=True
        )
    return network


def step(network: nn.Module, x: torch.Tensor) -> None:
    network.zero_grad()
    sum(output.square().mean() for output in network(x)).backward()


def peak_of_step(architecture: dict[str, Any], patch: tuple[int, ...]) -> float:
    """Return the gigabytes that a step adds to a process that has the network."""
    # Forked, as importing takes longer than the step; nothing has run here yet.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak, (architecture, patch))


def _peak(architecture: dict[str, Any], patch: tuple[int, ...]) -> float:
    # Libraries are loaded at the first convolution.
    nn.Conv3d(1, 1, 3)(torch.randn(1, 1, 8, 8, 8)).sum().backward()
    network, x = build(architecture), torch.randn(BATCH, 1, *patch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(network, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def sizes_and_memory(size: str, patch: tuple[int, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, architecture in architectures(size, patch).items():
        network = build(architecture, "meta").eval()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            network(torch.empty(1, 1, *patch, device="meta"))
        results[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "gmac": counter.get_total_flops() / 2e9,
            "peak_gb": peak_of_step(architecture, patch),
        }
        print(name, results[name], flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--patch", type=int, default=64, help="voxels per axis")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    patch = (options.patch,) * 3
    content: dict[str, Any] = {"torch": torch.__version__, "patch": list(patch), "batch": BATCH}
    content |= {"threads": 1, "outputs": OUTPUTS}
    content["networks"] = {size: sizes_and_memory(size, patch) for size in options.sizes}
    folder = Path(__file__).parent / "results"
    file = options.json or folder / f"network_options_{'_'.join(options.sizes)}_cpu.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
