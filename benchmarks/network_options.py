"""Cost of network options: parameters, operations, memory and time of each beside its plain twin.

    python benchmarks/network_options.py --size tiny --patch 64
    python benchmarks/network_options.py --size tiny --patch 64 --rounds 3

Makes the tables of docs/network_options.md. Memory is the peak of a process that makes one training
step in float32 on the CPU, less what it had before. For times the networks take turns for some
rounds, which are added to those of earlier calls, so that it can be done in pieces. The parts of
UNETR are timed in predictions: encoder (without the MTA), MTA, decoder. Small maps of a single
sample (channels x depth x height up to 20,480) torch convolves in a slower way than those of two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from report import about, markdown, write
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stunet_plugin.networks.from_plan import Resolved, stunet_architecture, with_options
from stunet_plugin.networks.presets import PRESETS, UNETR_SIZES
from stunet_plugin.networks.topology import strides_for_patch, token_strides

OUTPUTS, BATCH, REPEATS = 5, 2, 4
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    )
}
"""Which torch does not count."""
RATIOS = (0.0, 0.5, 0.75, 0.9)
"""Of pruned tokens, beside none (the plain network)."""
CUTS, EARLIER_CUTS = [3, 6, 9], [2, 4, 6]
"""As published; and for half the tokens earlier ones."""
STEP, PREDICTION, ENCODER, ASSEMBLY, DECODER = "step", "prediction", "encoder", "MTA", "decoder"
"""What is timed."""


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
    earlier = ", ".join(map(str, EARLIER_CUTS))
    prunings = {f"{ratio:g}": {"after": CUTS, "ratio": ratio} for ratio in RATIOS}
    prunings[f"0.5, cuts after {earlier}"] = {"after": EARLIER_CUTS, "ratio": 0.5}
    for name, pruning in prunings.items():
        kwargs = {**unetr["arch_kwargs"], "pruning": pruning}
        found[f"UNETR {size} STP {name}"] = {**unetr, "arch_kwargs": kwargs}
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


def sizes_and_memory(architecture: dict[str, Any], patch: tuple[int, ...]) -> dict[str, Any]:
    network = build(architecture, "meta").eval()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        network(torch.empty(1, 1, *patch, device="meta"))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gmac": counter.get_total_flops() / 2e9,
        "peak_gb": peak_of_step(architecture, patch),
    }


def measure_round(
    networks: dict[str, nn.Module], patch: tuple[int, ...], encoders: bool = False
) -> dict[str, Any]:
    """Return the seconds of a prediction, of its parts, and of a training step of each network, or
    of the ``encoders`` of UNETR alone."""
    found: dict[str, Any] = {}
    for name, network in networks.items():
        x = torch.randn(BATCH, 1, *patch)
        found[name] = (measure_encoder if encoders else measure)(network, x)
        print(name, found[name], flush=True)
    return found


def measure(network: Any, x: torch.Tensor) -> dict[str, float]:
    with torch.inference_mode(), timed_parts(network.eval()) as seconds:
        network(x[:1])  # warms up
        seconds.clear()
        found = {PREDICTION: timed(lambda: network(x[:1]))}
        if DECODER in seconds:
            found[DECODER] = seconds[DECODER][0]
    found |= measure_encoder(network, x)
    found[STEP] = timed(lambda: step(network.train(), x))
    network.zero_grad()
    return found


def measure_encoder(network: Any, x: torch.Tensor) -> dict[str, float]:
    """Return the seconds of the encoder of a UNETR without its MTA, and of this, medians."""
    if not hasattr(network.encoder, "patch_embedding"):
        return {}
    with torch.inference_mode(), timed_parts(network.eval()) as seconds:
        for _ in range(REPEATS):
            network.encoder(x[:1])
    found = {part: statistics.median(values) for part, values in seconds.items()}
    found[ENCODER] -= found.get(ASSEMBLY, 0.0)
    return found


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def timed_parts(network: Any) -> Iterator[dict[str, list[float]]]:
    """Yield the seconds of each pass through the parts of a UNETR; other networks have none."""
    seconds: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, Any] = {}
    if hasattr(network.encoder, "patch_embedding"):
        parts = {ENCODER: network.encoder, DECODER: network.decoder}
        if network.encoder.assembly is not None:
            parts[ASSEMBLY] = network.encoder.assembly
    started: dict[str, float] = {}

    def start(name: str) -> None:
        started[name] = time.perf_counter()

    def stop(name: str) -> None:
        seconds[name].append(time.perf_counter() - started[name])

    with ExitStack() as hooks:
        for name, part in parts.items():
            before = part.register_forward_pre_hook(lambda *_, name=name: start(name))
            after = part.register_forward_hook(lambda *_, name=name: stop(name))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield seconds


def table(networks: dict[str, Any]) -> str:
    """Return what was measured, medians of the rounds, as Markdown."""
    rows = []
    for name, one in networks.items():
        timed = one.get("seconds", {})
        times = [
            f"{statistics.median(timed[part]):.3f}" if part in timed else ""
            for part in (STEP, PREDICTION, ENCODER, ASSEMBLY, DECODER)
        ]
        rows.append(
            [name, f"{one['parameters']:,}", f"{one['gmac']:.2f}", f"{one['peak_gb']:.2f}", *times]
        )
    header = ["network", "parameters", "GMAC", "memory, GB", "step, s", "prediction, s"]
    return markdown([*header, "encoder", "MTA", "decoder"], rows)


def carry_out(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    os.environ["STUNET_CPU"] = "torch"  # not OpenVINO, which would compile
    patch = (options.patch,) * 3
    folder = Path(__file__).parent / "results"
    file = options.json or folder / f"network_options_{options.size}_{options.patch}_cpu.json"
    planned = architectures(options.size, patch)
    known = json.loads(file.read_text())["networks"] if file.is_file() else {}
    networks = {name: known.get(name, {}) for name in planned}
    for name, architecture in planned.items():
        if "gmac" not in networks[name]:
            networks[name] |= sizes_and_memory(architecture, patch)
            print(name, networks[name], flush=True)
    built = {name: build(architecture) for name, architecture in planned.items()}
    for _ in range(options.rounds):
        for name, seconds in measure_round(built, patch, options.encoders).items():
            for part, value in seconds.items():
                networks[name].setdefault("seconds", {}).setdefault(part, []).append(value)
    settings = {"patch": list(patch), "batch": BATCH, "outputs": OUTPUTS}
    write(
        file, {**about(threads=options.threads), **settings, "networks": networks}, table(networks)
    )
    print(table(networks))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="tiny", choices=[one.size for one in UNETR_SIZES])
    parser.add_argument("--patch", type=int, default=64, help="voxels per axis")
    parser.add_argument("--rounds", type=int, default=0, help="of time to add to those in the file")
    help_text = "measure the encoders of UNETR alone"
    parser.add_argument("--encoders", action="store_true", help=help_text)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    carry_out(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
