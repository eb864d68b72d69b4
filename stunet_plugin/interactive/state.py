"""State file of ``stunet prompt``: the prompts and masks so far, of one scan and one model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.trainers.safe_trainer import write_whole

FORMAT = "stunet prompt 1"
"""What a state file says it is."""


def write_state(
    file: Path,
    identity: Mapping[str, Any],
    drawn: Sequence[Mapping[str, Any]],
    masks: Sequence[np.ndarray],
) -> None:
    """Write prompts, which may hold a ``mask``, and the masks before each and at the end, whole or
    not at all."""
    arrays = {f"drawn_{x}": one["mask"] for x, one in enumerate(drawn) if "mask" in one}
    arrays |= {f"mask_{x}": y for x, y in enumerate(masks)}
    listed = [{x: y for x, y in one.items() if x != "mask"} for one in drawn]
    facts = json.dumps({"format": FORMAT, **identity, "prompts": listed})
    write_whole(file, partial(np.savez_compressed, facts=np.array(facts), **arrays))


def read_state(
    file: Path, identity: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Return what was written.

    Raises:
        PluginError: it is no state, or of something else than ``identity`` says.
    """
    try:
        # Nothing in it is unpickled.
        with np.load(file, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']!r}")
            drawn = [dict(one) for one in facts["prompts"]]
            for number, one in enumerate(drawn):
                if f"drawn_{number}" in arrays:
                    one["mask"] = arrays[f"drawn_{number}"]
            masks = [arrays[f"mask_{number}"] for number in range(len(drawn) + 1)]
            others = [what for what, value in identity.items() if facts[what] != value]
    except Exception as error:  # a file may hold anything
        raise damaged(file, error) from error
    if others:
        raise PluginError(
            f"--state {file} is of another {others[0]}. Name another file, or give the"
            f" {others[0]} that it was begun with."
        )
    return drawn, masks


def damaged(file: Path, error: Exception) -> PluginError:
    return PluginError(
        f"--state {file} is no state of `stunet prompt`, or is damaged ({type(error).__name__}:"
        f" {last_line(error)}). Name another file."
    )
