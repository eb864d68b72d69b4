"""``stunet prompt``: prompts of a command line onto a scan, a label map out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.interactive.open_session import open_session
from stunet_plugin.interactive.session import PromptSession
from stunet_plugin.utils.device import choose_device

if TYPE_CHECKING:
    from stunet_plugin.commands.prompt import Prompt


def run_prompt(options: Prompt) -> int:
    """Segment, write and report; return 0, or 1 if nothing was found."""
    given = [model for model in (options.model, options.named_model) if model]
    if len(given) != 1:
        raise PluginError("Give one model: stunet prompt MODEL ..., or --model MODEL.")
    out = Path(options.out).expanduser().absolute()
    state = Path(options.state).expanduser().absolute() if options.state else None
    _check_files(options, out, state)
    prompts = _parsed(options)
    device = choose_device(options.device)
    session = open_session(given[0], options.folds, options.checkpoint, device)
    _check_ending(session, out)
    session.set_image([Path(path) for path in options.scan])
    if state and state.is_file():
        session.load_state(state)
    if options.undo and not session.undo():
        raise PluginError(f"There is nothing to take back in {state}.")
    seconds = 0.0
    for add in prompts:
        started = time.monotonic()
        add(session)
        seconds = time.monotonic() - started
    for line in session.prompts:
        print(f"Prompt:       {line}")
    mask = session.mask
    session.write(out)
    if state:
        session.save_state(state)
        print(f"State:        {state}")
    count = int(np.count_nonzero(mask))
    volume = "" if session.voxel_ml is None else f", {count * session.voxel_ml:.3f} ml"
    print(f"Object:       {count} voxels{volume}, in {out}")
    if prompts:
        print(f"Last prompt:  {seconds:.2f} s")
    if not count:
        print("WARNING: nothing was found. Another point, or a box?")
    return 0 if count else 1


def _check_files(options: Prompt, out: Path, state: Path | None) -> None:
    """Raise a PluginError if an output would replace what it must not."""
    inputs = [Path(path).expanduser().absolute() for path in options.scan]
    if out.is_dir() or not out.parent.is_dir():
        raise PluginError(f"-o {out} must be a file in an existing folder, such as object.nii.gz.")
    if out in inputs or (state and state in (*inputs, out)):
        raise PluginError("-o and --state must be other files than the scan, and than each other.")
    goes_on = state is not None and state.is_file()
    if out.exists() and not (options.overwrite or goes_on):
        raise PluginError(f"-o {out} is there already. Name another file, or add --overwrite.")
    if state and (state.is_dir() or not state.parent.is_dir()):
        raise PluginError(f"--state {state} must be a file in an existing folder.")
    if options.undo and not goes_on:
        raise PluginError("--undo takes a prompt of an earlier call back: name its --state file.")
    drawn = (options.points, options.boxes, options.lassos, options.scribbles, options.mask)
    if not any(drawn) and not options.undo:
        raise PluginError("No prompt: give --point, --box, --lasso, --scribble or --mask.")
    if options.label is not None and not options.mask:
        raise PluginError("--label is for --mask: which of its labels.")


def _check_ending(session: PromptSession, out: Path) -> None:
    endings = session.file_endings
    if not out.name.endswith(tuple(endings)):
        raise PluginError(f"-o {out}: this model writes {', '.join(endings)}.")


def _parsed(options: Prompt) -> list[Callable[[PromptSession], Any]]:
    """Return the prompts of a command line, to be added to a session."""
    frame, prompts = options.coordinates, list[Callable[[PromptSession], Any]]()
    if options.mask:
        mask, label = options.mask, options.label
        prompts.append(lambda session: session.add_mask(mask, label))
    for text in options.boxes:
        numbers, positive = _numbers("--box", text, (6, 4))
        half = len(numbers) // 2
        prompts.append(_box(numbers[:half], numbers[half:], positive, frame))
    for kind, files in (("lasso", options.lassos), ("scribble", options.scribbles)):
        prompts += [_drawn(kind, *_signed(text)) for text in files]
    for text in options.points:
        numbers, positive = _numbers("--point", text, (3, 2))
        prompts.append(_point(numbers, positive, frame))
    return prompts


def _box(
    one: Sequence[float], other: Sequence[float], positive: bool, frame: str
) -> Callable[[PromptSession], Any]:
    return lambda session: session.add_box(one, other, positive, frame)


def _point(place: Sequence[float], positive: bool, frame: str) -> Callable[[PromptSession], Any]:
    return lambda session: session.add_point(place, positive, frame)


def _drawn(kind: str, file: str, positive: bool) -> Callable[[PromptSession], Any]:
    return lambda session: getattr(session, f"add_{kind}")(file, positive)


def _signed(text: str) -> tuple[str, bool]:
    """Split a prompt from its sign."""
    for ending, positive in ((",-", False), (",+", True)):
        if text.endswith(ending):
            return text[: -len(ending)], positive
    return text, True


def _numbers(flag: str, text: str, counts: Sequence[int]) -> tuple[list[float], bool]:
    """Return the numbers of a prompt, and whether it is where the object is."""
    bare, positive = _signed(text)
    try:
        numbers = [float(word) for word in bare.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        shape = "x,y,z" if flag == "--point" else "x,y,z,x,y,z"
        raise PluginError(
            f"{flag} {text!r} must be {shape}, with ',-' at the end where the object is not."
        )
    return numbers, positive
