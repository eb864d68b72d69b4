"""What a training step and a prediction of PCT-Net and FMUNet cost: ours beside a plain
transcription of the published way.

The plain networks (``plain_pctnet.py``, ``plain_fmunet.py``) do as the published ones: masks made
in every forward, attention step by step, stems and heads of all modes built. How the two are
compared stands in ``side_by_side.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import side_by_side

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import MODES, get_mode
from stunet_plugin.networks.misfm_from_plan import NETWORKS
from stunet_plugin.networks.misfm_presets import PRETEXT_OUTPUTS

PATCHES = ((1, (64, 128, 128)), (0, (96, 96, 96)))
"""The anisotropy mode and the patch size of each default measurement; the first is the published
example."""

STEPS = {"cpu": 2, "cuda": 10}


def build_parser() -> argparse.ArgumentParser:
    names = [network.name for network in NETWORKS]
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=(
            "Time and peak memory of training and inference of PCT-Net and FMUNet, ours beside a"
            " plain transcription."
        ),
        epilog=(
            "Example: python benchmarks/misfm_step.py --networks PCTNet --mode 2 --patch 32 128 128"
            " --batch 1"
        ),
    )
    add = parser.add_argument
    defaults = ", ".join(f"{' '.join(map(str, patch))} in mode {mode}" for mode, patch in PATCHES)
    add("--networks", nargs="+", choices=names, default=names, help=f"default: {', '.join(names)}")
    add(
        "--patch",
        type=int,
        nargs=3,
        metavar="N",
        help=f"voxels per axis, with --mode (default: {defaults})",
    )
    add("--mode", type=int, choices=range(len(MODES)), help="anisotropy mode, with --patch")
    side_by_side.add_options(parser, PRETEXT_OUTPUTS, STEPS)
    return parser


def choose(options: argparse.Namespace, _: str) -> side_by_side.Subjects:
    """Return the networks to measure, each with its modes and patches."""
    if (options.patch is None) != (options.mode is None):
        raise PluginError(
            "--patch and --mode go together: give both, or neither for the default measurements."
        )
    patches = PATCHES if options.patch is None else ((options.mode, tuple(options.patch)),)
    for mode, patch in patches:
        side_by_side.check_patch(patch, get_mode(mode).strides, f"A network in mode {mode}")
    # Only here, so that wrong options are told at once: it imports torch.
    from subjects import misfm_name

    return [
        (misfm_name(name, mode), patch)
        for name in dict.fromkeys(options.networks)
        for mode, patch in patches
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print the table of a file; return the exit code."""
    return side_by_side.main(build_parser(), choose, STEPS, arguments)


if __name__ == "__main__":
    sys.exit(main())
