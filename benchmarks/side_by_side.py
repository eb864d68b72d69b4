"""What the step benchmarks share: options, the rounds in which two networks alternate, and the
report.

Both networks compute the same function (checked first, with the same weights). Each measurement
runs in a process of its own, so that its peak of memory is its own, and the two networks alternate
for several rounds, so that a drift of the machine's speed meets both. What a step is and which
memory is meant stands in ``measure_step.py``; what the numbers of a report are in
``step_report.py``. Writes a JSON file and a Markdown table beside it. Linux or macOS.

Exit codes: 0 done, 1 the networks disagree or a measurement failed (the others are written), 2
    wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_report import bytes_text, markdown_table, read_report, round_ratios, seconds_text, spreads

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import Strides, check_patch_size, total_stride
from stunet_plugin.utils.files import write_atomically

if TYPE_CHECKING:
    from measure_step import Case

HERE = Path(__file__).resolve().parent
WORKER = HERE / "measure_step.py"

DEVICES = ("cpu", "cuda")
MODES = ("train", "inference")

AGREEMENT_LIMIT = 1e-4
"""Largest difference of an output, relative to the largest output, that float32 rounding in another
order may explain."""

Subjects = list[tuple[str, tuple[int, ...]]]
"""Names (see ``subjects.py``) and the patch size that each is measured with."""


class MeasurementError(Exception):
    """A measuring process failed; the message is its last line."""


def add_options(parser: argparse.ArgumentParser, classes: int, steps: dict[str, int]) -> None:
    """Add the options that all step benchmarks have.

    Args:
        parser: to add them to.
        classes: default of ``--classes``.
        steps: default of ``--steps`` per device.
    """
    add = parser.add_argument
    add(
        "--batch",
        type=int,
        default=2,
        help="samples of a training step (default: %(default)s); inference takes one",
    )
    add(
        "--classes",
        type=int,
        default=classes,
        help="outputs, background included (default: %(default)s)",
    )
    add("--modes", nargs="+", choices=MODES, default=MODES, help="what to measure (default: both)")
    add("--compile", action="store_true", help="measure with torch.compile besides")
    add(
        "--repeats",
        type=int,
        default=5,
        help="rounds in which the networks alternate (default: %(default)s)",
    )
    add(
        "--steps",
        type=int,
        help=(
            "timed steps per round (default:"
            f" {', '.join(f'{n} ({name})' for name, n in steps.items())})"
        ),
    )
    add(
        "--device",
        choices=["auto", *DEVICES],
        default="auto",
        help="auto takes a GPU where there is one",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file (default: a new one in benchmarks/results); the table goes to .md",
    )
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="print the table of this JSON file and measure nothing",
    )


def main(
    parser: argparse.ArgumentParser,
    choose: Callable[[argparse.Namespace, str], Subjects],
    steps: dict[str, int],
    arguments: Sequence[str] | None,
) -> int:
    """Run a benchmark, or print the table of a file; return the exit code.

    Args:
        parser: with :func:`add_options`; its ``prog`` names the script.
        choose: the subjects for the options and a device, checked.
        steps: timed steps per round by default, per device.
        arguments: of the command line.
    """
    options = parser.parse_args(arguments)
    try:
        if options.table is not None:
            print(markdown_table(read_report(options.table)))
            return 0
        settings = complete_settings(options, steps)
        subjects = choose(options, settings["device"])
        return run(settings, subjects, output_file(options.out, parser.prog, settings["device"]))
    except PluginError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def run(settings: dict[str, Any], subjects: Subjects, out: Path) -> int:
    """Check, measure, write; return the exit code."""
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": settings.pop("threads"),
            "gpu": None,
        },
        "versions": {
            "python": platform.python_version(),
            "stunet-plugin": __version__,
            **{package: importlib.metadata.version(package) for package in ("torch", "nnunetv2")},
        },
        "settings": settings,
        "agreement": {},
        "results": [],
    }
    failed = False
    for name, patch in subjects:
        try:
            if not agree(report, name, patch):
                print(
                    f"{name}: the networks do not compute the same, so a comparison means nothing.",
                    file=sys.stderr,
                )
                return 1
        except MeasurementError as error:
            print(f"{name}: could not compare the outputs ({error}).", file=sys.stderr)
            failed = True
            continue
        for mode, compiled in itertools.product(
            settings["modes"], (False, True) if settings["compile"] else (False,)
        ):
            result = measure_pair(settings, name, patch, mode, compiled)
            failed = failed or result["ratios"] is None
            report["results"].append(result)
            # After every pair, so that a run that is stopped leaves what it has.
            write_atomically(out, json.dumps(report, indent=2) + "\n")
            write_atomically(out.with_suffix(".md"), markdown_table(report) + "\n")
    if report["results"]:
        print(f"\n{markdown_table(report)}\n\nWritten: {out} and {out.with_suffix('.md')}")
    return 1 if failed else 0


def complete_settings(options: argparse.Namespace, steps: dict[str, int]) -> dict[str, Any]:
    """Fill in what depends on the device, and check what a user can get wrong."""
    for name in ("batch", "repeats", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PluginError(f"--{name} must be at least 1, not {value}.")
    if options.classes < 2:
        raise PluginError(
            f"--classes must be at least 2 (the background and one more), not {options.classes}."
        )
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise PluginError(
            "--device cuda: torch finds no GPU. Use --device cpu, or install a torch that fits the"
            " GPU's driver."
        )
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if options.device == "auto"
        else options.device
    )
    return {
        "device": device,
        "batch": options.batch,
        "classes": options.classes,
        "modes": [mode for mode in MODES if mode in options.modes],
        "compile": options.compile,
        "repeats": options.repeats,
        "steps": options.steps or steps[device],
        "precision": "float16 autocast" if device == "cuda" else "float32",
        "threads": torch.get_num_threads(),
    }


def check_patch(patch: tuple[int, ...], strides: Strides, who: str) -> None:
    """Raise unless a network with these strides can train on the patch."""
    check_patch_size(patch, strides, who)
    if patch == total_stride(strides):
        raise PluginError(
            f"--patch {list(patch)} leaves a single voxel to normalise at the deepest stage. Double"
            " an axis."
        )


def output_file(out: Path | None, script: str, device: str) -> Path:
    """Return the file to write.

    Raises:
        PluginError: it would replace a file, does not end in .json, or its folder is not there.
    """
    if out is None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        out = HERE / "results" / f"{Path(script).stem}_{device}_{stamp}.json"
        out.parent.mkdir(exist_ok=True)
    if out.suffix != ".json":
        raise PluginError(
            f"--out {out} must end in .json (the table goes into a file with .md instead)."
        )
    for path in (out, out.with_suffix(".md")):
        if path.exists():
            raise PluginError(
                f"--out {out}: {path} is there already. Choose another name, or delete it."
            )
    if not os.access(out.parent, os.W_OK):
        raise PluginError(f"--out {out}: the folder {out.parent} is not there or not writable.")
    return out


def make_case(
    settings: dict[str, Any],
    network: str,
    size: str,
    patch: tuple[int, ...],
    mode: str,
    compiled: bool,
) -> Case:
    from measure_step import Case

    shared = {name: settings[name] for name in ("device", "batch", "classes", "steps")}
    return Case(network=network, size=size, mode=mode, compiled=compiled, patch=patch, **shared)


def run_worker(case: Case) -> dict[str, Any]:
    """Run a case in a fresh process and return what it measured.

    Raises:
        MeasurementError: it ended with an error, out of memory for example.
    """
    command = [sys.executable, str(WORKER), json.dumps(asdict(case))]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if process.returncode < 0:
        raise MeasurementError(
            f"ended by signal {-process.returncode}; 9 is often the system running out of memory"
        )
    if process.returncode > 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise MeasurementError(lines[-1])
    reply: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return reply


def agree(report: dict[str, Any], size: str, patch: tuple[int, ...]) -> bool:
    """Compare the two networks' outputs, note it in the report, and return whether they are the
    same function."""
    found = run_worker(
        make_case(report["settings"], "ours", size, patch, "agreement", compiled=False)
    )
    report["machine"]["gpu"] = found.pop("gpu")
    report["agreement"][size] = found
    print(
        f"{size}: same weights, {found['outputs']} outputs: largest difference"
        f" {found['largest_difference']:.1e}, largest output {found['largest_output']:.1f}",
        flush=True,
    )
    return bool(found["largest_difference"] <= AGREEMENT_LIMIT * found["largest_output"])


def measure_pair(
    settings: dict[str, Any], size: str, patch: tuple[int, ...], mode: str, compiled: bool
) -> dict[str, Any]:
    """Measure ours and plain in turn, as many rounds as asked for; one that fails is not tried
    again."""
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    errors: dict[str, str] = {}
    title = f"{size} {mode}{' compiled' if compiled else ''}"
    for number, network in itertools.product(range(1, settings["repeats"] + 1), rounds):
        if network in errors:
            continue
        try:
            measured = run_worker(make_case(settings, network, size, patch, mode, compiled))
        except MeasurementError as error:
            errors[network] = str(error)
            print(
                f"{title}, round {number}, {network}: failed ({error})", file=sys.stderr, flush=True
            )
            continue
        measured["seconds"] = statistics.median(measured["seconds"])
        rounds[network].append(measured)
        print(
            f"{title}, round {number} of {settings['repeats']}, {network}: "
            f"{seconds_text(measured['seconds'])}, {bytes_text(measured['peak_bytes'])}",
            flush=True,
        )
    networks = {
        name: {"error": errors[name]} if name in errors else spreads(rounds[name])
        for name in rounds
    }
    ratios = (
        None
        if errors
        else {
            name: round_ratios(rounds, key)
            for name, key in (("time", "seconds"), ("memory", "peak_bytes"))
        }
    )
    return {
        "size": size,
        "patch": list(patch),
        "mode": mode,
        "compiled": compiled,
        "networks": networks,
        "ratios": ratios,
    }


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
