"""Promptable models on the same slices with the same prompts: Dice by box and 1, 3, 5 points.

A PromptTrainer's 3D model beside SAM-Med2D, or any two that ``stunet prompt`` takes, on labelled
scans in nnU-Net's raw format. As in SAM-Med2D's evaluation an object is a class in one slice
(across the first array axis): its exact box, or points in the middle of the largest error in that
slice; only that slice is scored. 3D models could do more with a prompt.

    python experiments/prompts_side_by_side.py --data DATASET --json FILE --figure FILE
        --models ours=MODEL_FOLDER sam-med2d=sam-med2d --cases hippocampus_042 hippocampus_286
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cases_in, write_json
from report import about, markdown, run_script
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.interactive.session import PromptSession, open_session
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.sam.curve import POINTS, STEPS, chosen_slices, dice_of, largest_error, summarise
from stunet_plugin.sam.prompts import boxes_of
from stunet_plugin.sam.slice_session import middle_of
from stunet_plugin.utils.figures import saved_figure
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.images import read_label_array

REFERENCE, FOUND = "tab:green", "tab:red"


def prompted(session: PromptSession, index: int, target: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a model makes of an object (height, width) in a slice, by the prompts so far."""
    session.reset()
    x0, y0, x1, y1 = map(int, boxes_of(target[None, None].long())[0])
    mask = session.add_box((x0, y0, index), (x1 - 1, y1 - 1, index))
    yield STEPS[0], torch.from_numpy(mask[index] > 0)
    session.reset()
    found = torch.zeros_like(target)
    for count in range(1, max(POINTS) + 1):
        error, positive = largest_error(found, target)
        if bool(error.any()):
            mask = session.add_point((*middle_of(error), index), positive)
            found = torch.from_numpy(mask[index] > 0)
        if count in POINTS:
            yield STEPS[1 + POINTS.index(count)], found


def measure(
    sessions: dict[str, PromptSession], options: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], list[Any]]:
    """Return the Dice of every object in the chosen slices by model, and what the picture shows of
    the first case: slice, reference and each model's masks."""
    description = read_json(options.data / "dataset.json")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sessions}
    shown: list[Any] = []
    for case in options.cases:
        scan = options.data / "imagesTr" / f"{case}_0000.nii.gz"
        for session in sessions.values():
            session.set_image(scan)
        first = next(iter(sessions.values()))
        label, _, _ = read_label_array(
            options.data / "labelsTr" / f"{case}.nii.gz", first.model.reader
        )
        named = {
            x: y for x, y in description["labels"].items() if x not in ("background", "ignore")
        }
        masks = {x: torch.from_numpy(np.isin(label, np.atleast_1d(y))) for x, y in named.items()}
        for index, names in list(chosen_slices(masks).items())[:: options.every]:
            for one in names:
                target, made = masks[one][index], {}
                for name, session in sessions.items():
                    made[name] = dict(prompted(session, index, target))
                    dice = {step: dice_of(mask, target) for step, mask in made[name].items()}
                    found[name].append({"case": case, "slice": index, "class": one, "dice": dice})
                if not shown or (case == shown[0] and target.sum() > shown[2].sum()):
                    shown = [case, index, target, made, scan, first.model.reader]
    return found, shown


def save_figure(shown: list[Any], path: Path) -> None:
    """Draw the largest object of the first case: the reference in green, what is found in red."""
    case, index, target, made, scan, reader = shown
    image = reader.read_images([str(scan)])[0][0, index]
    with saved_figure(path, 2.2 * len(STEPS), 2.4 * len(made)) as figure:
        grid = np.reshape(figure.subplots(len(made), len(STEPS)), (len(made), len(STEPS)))
        for row, (name, masks) in zip(grid, made.items(), strict=True):
            for axis, (step, mask) in zip(row, masks.items(), strict=True):
                axis.imshow(image, cmap="gray")
                for outline, colour in ((target, REFERENCE), (mask, FOUND)):
                    if outline.any():
                        axis.contour(outline.numpy(), [0.5], colors=colour, linewidths=1.2)
                axis.set_title(f"{name}\n{step}: {dice_of(mask, target):.2f}", fontsize=7)
                axis.axis("off")
        figure.suptitle(f"{case}, slice {index}", fontsize=8)


def carry_out(options: argparse.Namespace) -> None:
    known = cases_in(options.data / "labelsTr")
    options.cases = options.cases or known[:3]
    if unknown := [case for case in options.cases if case not in known]:
        raise PluginError(f"--cases: {options.data}/labelsTr has no {', '.join(unknown)}.")
    pairs = [model.partition("=") for model in options.models]
    if wrong := [name for name, _, folder in pairs if not folder]:
        raise PluginError(f"--models {wrong[0]}: give NAME=FOLDER, or sam-med2d=sam-med2d.")
    sessions = {x: open_session(y, None, CHECKPOINT, options.device) for x, _, y in pairs}
    found, shown = measure(sessions, options)
    results = {name: summarise(objects) for name, objects in found.items()}
    write_json(options.json, {**about(note=options.machine), "models": results})
    if options.figure:
        save_figure(shown, options.figure)
    rows = [
        [name, str(one["mean"]["masks"]), *(f"{one['mean']['dice'][x]:.3f}" for x in STEPS)]
        for name, one in results.items()
    ]
    print(markdown(["model", "masks", *STEPS], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="raw dataset with labels")
    add("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="as stunet prompt takes")
    add("--cases", nargs="+", metavar="CASE", help="held out of all trainings (else: the first 3)")
    add("--every", type=int, default=1, metavar="N", help="only every Nth of the chosen slices")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--machine", default="", help="what it runs on, in words")
    add("--figure", type=Path, metavar="FILE", help="for a picture, .png")
    add("--json", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args(arguments)
    return run_script(lambda: carry_out(options), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
