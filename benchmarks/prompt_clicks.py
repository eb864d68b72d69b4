"""Time per click of a PromptSession on a CPU, in patches of a chosen size.

Take a scan that fits into the patch: then a click is one pass of the network, whatever the weights.
Where an object reaches out of the patch there are more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch

from stunet_plugin.interactive.session import PromptSession
from stunet_plugin.networks import cpu_engine
from stunet_plugin.utils.files import read_json, write_atomically


def with_patch(model: Path, folder: Path, patch: list[int]) -> Path:
    """Copy a model folder, with another patch in its plans."""
    copy = Path(shutil.copytree(model, folder / model.name))
    plans = read_json(copy / "plans.json")
    name = model.name.rpartition("__")[2]
    plans["configurations"][name]["patch_size"] = patch
    write_atomically(copy / "plans.json", json.dumps(plans))
    return copy


def measure(model: Path, image: Path, patch: list[int], clicks: int) -> dict[str, Any]:
    """Return seconds of opening a model and a scan and of each click, spread over the diagonal."""
    begun = time.perf_counter()
    session = PromptSession(model)
    session.set_image(image)
    opened = time.perf_counter() - begun
    network: torch.nn.Module = session.model.predictor.network
    seconds = []
    for click in range(clicks + 1):
        place = [size * (click + 1) // (clicks + 2) for size in session.shape[::-1]]
        begun = time.perf_counter()
        session.add_point(place, positive=click % 2 == 0)
        seconds.append(time.perf_counter() - begun)
    parameters = sum(weights.numel() for weights in network.parameters())
    return {
        "model": model.name,
        "parameters": parameters,
        "patch": patch,
        "scan": list(session.shape),
        "open_seconds": opened,
        "first_click_seconds": seconds[0],
        "later_clicks_seconds": report.spread(seconds[1:]),
        "engine": cpu_engine.precision_in_use() or "torch",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--models", type=Path, nargs="+", required=True, metavar="FOLDER", help="promptable ones")
    add("--image", type=Path, required=True, help="a scan")
    add("--patch", type=int, nargs=3, default=[96, 96, 96], help="voxels, instead of the plan's")
    add("--clicks", type=int, default=5, help="after the first")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--machine", default="", help="what it runs on, in words")
    add("--json", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(options.models):
            copy = with_patch(model.resolve(), Path(folder, str(number)), options.patch)
            found.append(measure(copy, options.image, options.patch, options.clicks))
            later = statistics.median(found[-1]["later_clicks_seconds"]["rounds"])
            first = found[-1]["first_click_seconds"]
            print(f"{model.name}: first {first:.2f} s, later {later:.2f} s", flush=True)
    machine = {"note": options.machine, "threads": options.threads}
    write_atomically(
        options.json, json.dumps({**report.about(**machine), "runs": found}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
