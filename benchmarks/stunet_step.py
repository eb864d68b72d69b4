"""What a training step and a prediction cost per size of STU-Net: ours beside a plain transcription
of the formula.

The plain network follows the published order of operations (``plain_stunet.py``). How the two are
compared stands in ``side_by_side.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import side_by_side

from stunet_plugin.networks.memory import PUBLISHED_STRIDES
from stunet_plugin.networks.presets import PRESETS, REFERENCE_OUTPUT_CHANNELS


@dataclass(frozen=True)
class Defaults:
    """What is measured on a device if the options do not say otherwise."""

    sizes: tuple[str, ...]
    patch: tuple[int, ...]
    steps: int


DEFAULTS = {
    "cpu": Defaults(("tiny", "small"), (64,) * 3, 3),
    "cuda": Defaults(("small", "base", "large", "huge"), (128,) * 3, 10),
}
STEPS = {device: defaults.steps for device, defaults in DEFAULTS.items()}


def build_parser() -> argparse.ArgumentParser:
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=(
            "Time and peak memory of training and inference per size of STU-Net, ours beside a"
            " plain transcription."
        ),
        epilog=(
            "Example: python benchmarks/stunet_step.py --sizes small base --patch 96 96 96"
            " --classes 14 --out comparison.json"
        ),
    )
    add = parser.add_argument
    add(
        "--sizes",
        nargs="+",
        choices=list(PRESETS),
        help=f"default: {', '.join(cpu.sizes)} (CPU); {', '.join(cuda.sizes)} (CUDA)",
    )
    add(
        "--patch",
        type=int,
        nargs=3,
        metavar="N",
        help=f"voxels per axis (default: {cpu.patch[0]} (CPU), {cuda.patch[0]} (CUDA))",
    )
    side_by_side.add_options(parser, REFERENCE_OUTPUT_CHANNELS, STEPS)
    return parser


def choose(options: argparse.Namespace, device: str) -> side_by_side.Subjects:
    """Return the sizes to measure and their patch."""
    defaults = DEFAULTS[device]
    patch = tuple(options.patch or defaults.patch)
    side_by_side.check_patch(patch, PUBLISHED_STRIDES, "STU-Net with its five poolings by two")
    return [(size, patch) for size in dict.fromkeys(options.sizes or defaults.sizes)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print the table of a file; return the exit code."""
    return side_by_side.main(build_parser(), choose, STEPS, arguments)


if __name__ == "__main__":
    sys.exit(main())
