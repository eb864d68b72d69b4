"""Scripts that report: machine, versions, spread over rounds, Markdown, JSON, exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import write_atomically

GIBIBYTE = 1024**3


def about(**machine: Any) -> dict[str, Any]:
    """Return date, machine and versions."""
    packages = ("torch", "nnunetv2", "numpy", "scipy", "SimpleITK")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), **machine},
        "versions": {
            "python": platform.python_version(),
            "stunet-plugin": __version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def cpu_model() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes and the values, one per round."""
    middle = statistics.median(values)
    return {"median": middle, "lowest": min(values), "highest": max(values), "rounds": [*values]}


def ratios(ours: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Return ours over plain, each within its round, so that slow minutes cancel."""
    return spread([one / other for one, other in zip(ours, plain, strict=True)])


def ratio_text(ratio: dict[str, Any]) -> str:
    """Return the median, and in brackets the extremes where they differ."""
    lowest, highest = f"{ratio['lowest']:.2f}", f"{ratio['highest']:.2f}"
    return f"{ratio['median']:.2f}" + (f" ({lowest} to {highest})" if lowest != highest else "")


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def bytes_text(size: float) -> str:
    return f"{size / GIBIBYTE:.2f} GiB" if size >= GIBIBYTE else f"{1024 * size / GIBIBYTE:.0f} MiB"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Return a Markdown table; all columns but the first ``texts`` are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def check_output(out: Path) -> None:
    """Raise PluginError unless ``out`` (.json) and the .md beside it can be written."""
    if out.suffix != ".json":
        raise PluginError(f"--out {out} must end in .json; the table goes to .md beside it.")
    present = [path for path in (out, out.with_suffix(".md")) if path.exists()]
    if present:
        raise PluginError(f"--out {out}: {present[0]} is there already. Choose another name.")
    if not os.access(out.parent, os.W_OK):
        raise PluginError(f"--out {out}: the folder {out.parent} is missing or not writable.")


def write(out: Path, report: dict[str, Any], table: str) -> None:
    """Write the report and, beside it, its table."""
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), table + "\n")


def run_script(work: Callable[[], int | None], script: str, interrupted: str = "") -> int:
    """Run the work of a script and return its exit code: 2 for wrong input, 130 if interrupted."""
    try:
        return work() or 0
    except PluginError as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted. {interrupted}".rstrip(), file=sys.stderr)
        return 130
