"""The report of the step benchmarks: medians and ratios over its rounds, and the Markdown table
made from its JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.memory import GIGABYTE


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of one value per round, the extremes and the values."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "rounds": list(values),
    }


def spreads(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of everything that a process measures; None for what the device does not
    tell."""
    return {
        key: None if rounds[0][key] is None else spread([measured[key] for measured in rounds])
        for key in rounds[0]
    }


def round_ratios(rounds: dict[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """Ours over plain, each within its round: what slows the machine down for minutes cancels."""
    return spread(
        [
            ours[key] / plain[key]
            for ours, plain in zip(rounds["ours"], rounds["plain"], strict=True)
        ]
    )


def read_report(path: Path) -> dict[str, Any]:
    """Read a file that this script wrote.

    Raises:
        PluginError: it cannot be read, or is something else.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        markdown_table(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PluginError(
            f"--table {path} is not a JSON file of this script ({type(error).__name__}: {error})."
        ) from error
    return report


def markdown_table(report: dict[str, Any]) -> str:
    """Return the results as a Markdown table, with a line on how they came about."""
    settings, machine, versions = report["settings"], report["machine"], report["versions"]
    # Reports from before there were several patches have it in the settings.
    patches = [
        " x ".join(map(str, result.get("patch", settings.get("patch"))))
        for result in report["results"]
    ]
    one_patch = len(set(patches)) == 1
    lines = [
        (
            "| size | step | time ours | time plain | ours / plain | memory ours | memory plain |"
            " ours / plain |"
        ),
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result, patch in zip(report["results"], patches, strict=True):
        size = result["size"] if one_patch else f"{result['size']}, {patch}"
        cells = [size, result["mode"] + (", compiled" if result["compiled"] else "")]
        for key, ratio, text in (
            ("seconds", "time", seconds_text),
            ("peak_bytes", "memory", bytes_text),
        ):
            for network in (result["networks"]["ours"], result["networks"]["plain"]):
                cells.append("failed" if "error" in network else text(network[key]["median"]))
            cells.append(ratio_text(result["ratios"][ratio]) if result["ratios"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    where = (
        machine["gpu"]
        or f"{machine['cpu']}, {machine['threads']} thread(s), {machine['cores']} core(s)"
    )
    lines += [
        "",
        (
            f"{where}; torch {versions['torch']}, nnunetv2 {versions['nnunetv2']}, stunet-plugin"
            f" {versions['stunet-plugin']}; {report['date'][:10]}."
            f" {f'Patch {patches[0]}, batch' if one_patch else 'Batch'} {settings['batch']} in"
            f" training and 1 in inference, {settings['classes']} outputs, {settings['precision']}."
            f" Medians of {settings['repeats']} round(s) of {settings['steps']} step(s), each in a"
            " process of its own; in brackets the lowest and highest ratio of a round."
        ),
    ]
    return "\n".join(lines)


def ratio_text(ratio: dict[str, Any]) -> str:
    """Median, and in brackets the extremes where they differ from each other (those of memory
    rarely do)."""
    lowest, highest = f"{ratio['lowest']:.2f}", f"{ratio['highest']:.2f}"
    return f"{ratio['median']:.2f}" + (f" ({lowest} to {highest})" if lowest != highest else "")


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def bytes_text(size: float) -> str:
    return f"{size / GIGABYTE:.2f} GiB" if size >= GIGABYTE else f"{1024 * size / GIGABYTE:.0f} MiB"
