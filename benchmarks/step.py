"""Time and memory of a training step and of a prediction: ours beside the published network.

"Plain" is a transcription of the published network in its published order of operations
(``plain_stunet.py``, ``plain_pctnet.py``, ``plain_fmunet.py``); the same weights must give the same
outputs, which is checked first. Each measurement (``measure_step.py``) has a process of its own,
and the two alternate for several rounds, so that a drift of the machine's speed meets both. With
``--profile`` the share of time of each kind of operation (``profile_step.py``) instead. Writes a
JSON file and a Markdown table beside it. Linux or macOS.

Exit codes: 0 done, 1 the networks disagree or a measurement failed (the others are written),
2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import profile_step
import report as reports
import torch
from measure_step import INFERENCE, OURS, PLAIN, TRAIN, Case, agreement, measure
from networks import MISFM, MODE_PATCHES, NAMES, find_subject
from report import bytes_text, ratio_text, seconds_text

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import check_patch_size, total_stride
from stunet_plugin.utils.files import read_json

AGREEMENT_LIMIT = 1e-4
"""Largest difference of outputs, relative to the largest output, that rounding may explain."""
DEFAULTS = {
    "cpu": (["tiny", "small"], 64, 3),
    "cuda": (["small", "base", "large", "huge"], 128, 10),
}
"""Networks, patch of STU-Net and timed steps per device."""
MEASURES = {"time": ("seconds", seconds_text), "memory": ("peak_bytes", bytes_text)}
"""Name in the table to key in the JSON, and how a value is written."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description="Time and peak memory of training and inference, ours beside published.",
        epilog="Example: python benchmarks/step.py --networks small base --out step.json",
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--patch", type=int, nargs=3, metavar="N", help="voxels per axis, of all networks")
    add("--batch", type=int, default=2, help="samples of a training step (2); inference takes one")
    add("--classes", type=int, default=15, help="outputs, background included (15)")
    add("--modes", nargs="+", choices=(TRAIN, INFERENCE), default=[TRAIN, INFERENCE])
    add("--compile", action="store_true", help="measure with torch.compile besides")
    add("--repeats", type=int, default=5, help="rounds in which the two alternate (5)")
    add("--steps", type=int, help="timed steps per round (3 on the CPU, 10 on a GPU)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--profile", action="store_true", help="shares of the operations instead, in one round")
    add("--peak-tflops", type=float, metavar="N", help="of the GPU; the share that is reached")
    add("--out", type=Path, metavar="FILE", help="JSON file; the table goes to .md beside it")
    add("--table", type=Path, metavar="FILE", help="print the table of this JSON file, no more")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    return reports.run_script(lambda: carry_out(options), __file__)


def carry_out(options: argparse.Namespace) -> int:
    """Measure and write, or print the table of what was; return the exit code."""
    if options.table is not None:
        report = read_json(options.table)
        if "results" not in report:
            raise PluginError(f"--table {options.table}: not written by step.py --out.")
        print(markdown_table(report))
        return 0
    cases = check(options)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    keys = ("device", "batch", "classes", "modes", "compile", "repeats", "steps")
    settings = {key: getattr(options, key) for key in keys}
    settings["precision"] = "float16 autocast" if gpu else "float32"
    report = {**reports.about(threads=torch.get_num_threads(), gpu=gpu), "settings": settings}
    return (profile if options.profile else compare)(options, cases, report)


def check(options: argparse.Namespace) -> list[Case]:
    """Fill in defaults and return a case per network.

    Raises:
        PluginError: an option is wrong.
    """
    names, side, steps = DEFAULTS[options.device]
    options.steps = steps if options.steps is None else options.steps
    for name, least in {"batch": 1, "repeats": 1, "steps": 1, "classes": 2}.items():
        if getattr(options, name) < least:
            raise PluginError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PluginError("--device cuda: torch finds no GPU. Use --device cpu.")
    if options.out is None:
        raise PluginError("--out FILE.json is needed, or --table.")
    reports.check_output(options.out)
    cases = []
    for name in dict.fromkeys(options.networks or names):
        patch = MODE_PATCHES[MISFM[name][1]] if name in MISFM else (side,) * 3
        patch = tuple(options.patch or patch)
        strides = find_subject(name).strides
        check_patch_size(patch, strides, name)
        if patch == total_stride(strides):
            raise PluginError(f"--patch {list(patch)} leaves a single voxel at the deepest stage.")
        sizes = options.batch, options.classes, options.steps
        cases.append(Case(OURS, name, TRAIN, False, options.device, patch, *sizes))
    return cases


def in_new_process(work: Callable[[Case], dict[str, Any]], case: Case) -> dict[str, Any]:
    """Run a measurement in a fresh process, whose peak of memory is its own; return its result, or
    an ``error``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, case).result()
        except Exception as error:  # out of memory, or killed for it
            text = f"{type(error).__name__}: {error}"
    print(f"{case.size} {case.mode}, {case.network}: {text}", file=sys.stderr, flush=True)
    return {"error": text}


def profile(options: argparse.Namespace, cases: Sequence[Case], report: dict[str, Any]) -> int:
    """Profile both networks in each mode, and write."""
    work = partial(profile_step.profile_step, peak_tflops=options.peak_tflops)
    rows = report["rows"] = []
    for case, mode, network in itertools.product(cases, options.modes, (OURS, PLAIN)):
        one = replace(case, mode=mode, network=network, compiled=options.compile)
        row = in_new_process(work, one)
        if "error" in row:
            return 1
        rows.append(row)
        reports.write(options.out, report, profile_step.table(rows))
    print(f"{profile_step.table(rows)}\n\nWritten: {options.out}")
    return 0


def compare(options: argparse.Namespace, cases: Sequence[Case], report: dict[str, Any]) -> int:
    """Compare outputs, measure both networks, and write; return the exit code."""
    report |= {"agreement": {}, "results": []}
    failed = False
    for case in cases:
        found = report["agreement"][case.size] = in_new_process(agreement, case)
        if "error" in found:
            failed = True
            continue
        print(f"{case.size}, same weights: {found}", flush=True)
        if found["largest_difference"] > AGREEMENT_LIMIT * found["largest_output"]:
            print(f"{case.size}: the two networks do not compute the same.", file=sys.stderr)
            return 1
        for mode, compiled in itertools.product(options.modes, {False, options.compile}):
            pair = replace(case, mode=mode, compiled=compiled)
            report["results"].append(measure_pair(pair, options.repeats))
            failed = failed or report["results"][-1]["ratios"] is None
            reports.write(options.out, report, markdown_table(report))
    if report["results"]:
        print(f"\n{markdown_table(report)}\n\nWritten: {options.out}")
    return 1 if failed else 0


def measure_pair(case: Case, repeats: int) -> dict[str, Any]:
    """Measure ours and plain in turn; one that fails is not tried again."""
    rounds: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
    networks: dict[str, dict[str, Any]] = {}
    title = f"{case.size} {case.mode}{' compiled' if case.compiled else ''}"
    for number, network in itertools.product(range(repeats), rounds):
        if network in networks:
            continue
        measured = in_new_process(measure, replace(case, network=network))
        if "error" in measured:
            networks[network] = measured
            continue
        measured["seconds"] = statistics.median(measured["seconds"])
        rounds[network].append(measured)
        text = ", ".join(write(measured[key]) for key, write in MEASURES.values())
        print(f"{title}, round {number + 1} of {repeats}, {network}: {text}", flush=True)
    values = {
        name: {key: [one[key] for one in found] for key, _ in MEASURES.values()}
        for name, found in rounds.items()
    }
    ratios = None
    if not networks:
        ratios = {
            name: reports.ratios(values[OURS][key], values[PLAIN][key])
            for name, (key, _) in MEASURES.items()
        }
    for name in rounds.keys() - networks:
        networks[name] = {key: reports.spread(one) for key, one in values[name].items()}
    about = {"size": case.size, "patch": list(case.patch), "mode": case.mode}
    return {**about, "compiled": case.compiled, "networks": networks, "ratios": ratios}


def markdown_table(report: dict[str, Any]) -> str:
    """Return the results as a Markdown table, with a line on how they came about."""
    settings, machine, versions = report["settings"], report["machine"], report["versions"]
    header = ["network", "step"]
    for name in MEASURES:
        header += [f"{name} ours", f"{name} plain", "ours / plain"]
    rows = []
    patches = [" x ".join(map(str, result["patch"])) for result in report["results"]]
    one_patch = len(set(patches)) == 1
    for result, patch in zip(report["results"], patches, strict=True):
        row = [result["size"] + ("" if one_patch else f", {patch}")]
        row.append(result["mode"] + (", compiled" if result["compiled"] else ""))
        for name, (key, write) in MEASURES.items():
            for network in (result["networks"][OURS], result["networks"][PLAIN]):
                row.append("failed" if "error" in network else write(network[key]["median"]))
            row.append(ratio_text(result["ratios"][name]) if result["ratios"] else "")
        rows.append(row)
    cpu = f"{machine['cpu']}, {machine['threads']} thread(s), {machine['cores']} core(s)"
    packages = ", ".join(f"{one} {versions[one]}" for one in ("torch", "nnunetv2", "stunet-plugin"))
    note = (
        f"{machine['gpu'] or cpu}; {packages}; {report['date'][:10]}."
        f" {f'Patch {patches[0]}, batch' if one_patch else 'Batch'} {settings['batch']} in training"
        f" and 1 in inference, {settings['classes']} outputs, {settings['precision']}. Medians of"
        f" {settings['repeats']} round(s) of {settings['steps']} step(s), each in a process of its"
        " own; in brackets the lowest and highest ratio of a round."
    )
    return f"{reports.markdown(header, rows, 2)}\n\n{note}"


if __name__ == "__main__":
    sys.exit(main())
