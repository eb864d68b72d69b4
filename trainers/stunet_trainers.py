"""STUNetTrainer, and one trainer for every published size and schedule.

Paper: arXiv:2304.06716, section 4; hyper-parameters as in the published trainers. The sizes and
    schedules are data
(``stunet_plugin.networks.presets`` and ``SCHEDULES``), the classes are made from them:
``STUNetTrainer_large_ft`` and so on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from stunet_plugin.errors import did_you_mean
from stunet_plugin.networks.from_plan import resolve_stunet
from stunet_plugin.networks.presets import PRESETS, STUNetPreset, get_preset
from stunet_plugin.trainers.activation_checkpointing import CheckpointingTrainer


@dataclass(frozen=True)
class Schedule:
    """What a trainer's suffix changes.

    Attributes:
        suffix: of the trainer's name.
        epochs: of the training.
        learning_rate: at the start; nnU-Net's poly schedule lowers it.
        fine_tuning: starts from pretrained weights.
        iterations, val_iterations: per epoch; None leaves nnU-Net's 250 and 50.
    """

    suffix: str
    epochs: int = 1000
    learning_rate: float = 1e-2
    fine_tuning: bool = False
    iterations: int | None = None
    val_iterations: int | None = None


SCHEDULES = (
    Schedule(""),
    Schedule("_ft", learning_rate=1e-3, fine_tuning=True),
    Schedule("_ep2k", epochs=2000),
    Schedule("_ep4k", epochs=4000),
    # Not published: for trying things out in minutes.
    Schedule("_ep5", epochs=5, iterations=100, val_iterations=20),
)


class STUNetTrainer(CheckpointingTrainer):
    """Trains the STU-Net of the plan where the plan carries one, else the published default size
    (base)."""

    preset: ClassVar[STUNetPreset | None] = None

    @classmethod
    def resolve_architecture(cls, configuration: dict[str, Any]) -> dict[str, Any]:
        return resolve_stunet(configuration, cls.preset, cls.__name__)


def make_trainer(size: str | None, schedule: Schedule) -> type[STUNetTrainer]:
    """Make the trainer class of a size (None: the plan's) and a schedule."""
    name = "STUNetTrainer" + (f"_{size}" if size else "") + schedule.suffix
    size_text = (
        f"STU-Net {size}" if size else "STU-Net of the plan's size (base where the plan names none)"
    )
    attributes = {
        "__doc__": (
            f"{size_text}: {schedule.epochs} epochs at a learning rate of"
            f" {schedule.learning_rate:g}."
        ),
        "__module__": __name__,
        "preset": get_preset(size) if size else None,
        "learning_rate": schedule.learning_rate,
        "epochs": schedule.epochs,
        "iterations": schedule.iterations,
        "val_iterations": schedule.val_iterations,
        "fine_tuning": schedule.fine_tuning,
    }
    return type(name, (STUNetTrainer,), attributes)


TRAINERS: dict[str, type[STUNetTrainer]] = {"STUNetTrainer": STUNetTrainer}
for _size in (None, *PRESETS):
    for _schedule in SCHEDULES:
        if _size or _schedule.suffix:
            _trainer = make_trainer(_size, _schedule)
            TRAINERS[_trainer.__name__] = _trainer
globals().update(TRAINERS)

__all__ = list(TRAINERS)


def hint_for_unknown(name: str) -> str | None:
    """Return a line for someone who asked for a trainer of this family that does not exist, or None
    if it is no such name."""
    if not name.startswith("STUNetTrainer") or name in TRAINERS:
        return None
    return (
        f"stunet-plugin has no trainer {name}: sizes {', '.join(PRESETS)}, each with nothing or"
        f" {', '.join(schedule.suffix for schedule in SCHEDULES if schedule.suffix)} after"
        f" it.{did_you_mean(name, TRAINERS)}"
    )


def __getattr__(name: str) -> Any:
    # nnU-Net looks for a trainer by hasattr on each module. It goes on looking after this one
    # (users derive their own), and its last word on a name that nobody knows does not say what
    # would be allowed; this does.
    hint = hint_for_unknown(name)
    if hint:
        print(hint, file=sys.stderr)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
