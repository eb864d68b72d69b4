"""STUNetTrainer, and a trainer for every published size and schedule, such as
``STUNetTrainer_large_ft``; hyper-parameters of the published ones (arXiv:2304.06716, section 4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from stunet_plugin.networks.presets import PRESETS, STUNetPreset
from stunet_plugin.trainers.activation_checkpointing import CheckpointingTrainer


@dataclass(frozen=True)
class Schedule:
    """What a trainer's suffix changes; iterations are per epoch."""

    suffix: str
    epochs: int = 1000
    learning_rate: float = 1e-2
    fine_tuning: bool = False
    iterations: int = 250
    val_iterations: int = 50


SCHEDULES = (
    Schedule(""),
    Schedule("_ft", learning_rate=1e-3, fine_tuning=True),
    Schedule("_ep2k", epochs=2000),
    Schedule("_ep4k", epochs=4000),
    # Not published: for trying things out in minutes, on a GPU or (_ep1) on a CPU.
    Schedule("_ep5", epochs=5, iterations=100, val_iterations=20),
    Schedule("_ep1", epochs=1, iterations=20, val_iterations=4),
)


class STUNetTrainer(CheckpointingTrainer):
    """Trains the plan's STU-Net, or the ``preset``; with a plan of nnU-Net's U-Net, base."""

    preset = None


def _make_trainer(preset: STUNetPreset | None, schedule: Schedule) -> type[STUNetTrainer]:
    size = f"STU-Net {preset.name}" if preset else "STU-Net of the plan's size, or base"
    changes = asdict(schedule)
    epochs = "1 epoch" if schedule.epochs == 1 else f"{schedule.epochs} epochs"
    attributes = {
        "__doc__": f"{size}: {epochs}, learning rate {schedule.learning_rate:g}.",
        "__module__": __name__,
        "preset": preset,
    }
    name = "STUNetTrainer" + (f"_{preset.name}" if preset else "") + changes.pop("suffix")
    return type(name, (STUNetTrainer,), {**attributes, **changes})


TRAINERS = {
    trainer.__name__: trainer
    for preset in (None, *PRESETS.values())
    for trainer in (_make_trainer(preset, schedule) for schedule in SCHEDULES)
}
TRAINERS["STUNetTrainer"] = STUNetTrainer
globals().update(TRAINERS)
