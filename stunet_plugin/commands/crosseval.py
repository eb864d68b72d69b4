"""``stunet crosseval``: models compared on datasets, on the classes they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stunet_plugin.commands.command import EVALUATION, RESUMES, Command, argument


def _classes(text: str) -> str | list[str]:
    if text in ("shared", "pair"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Crosseval(Command):
    """Options of ``stunet crosseval``."""

    command: ClassVar = "crosseval"
    group: ClassVar = EVALUATION
    summary: ClassVar = (
        "Run models on datasets and compare them on the classes that they share: tables, tests,"
        " pictures, a report."
    )
    example: ClassVar = (
        "stunet crosseval --model A=MODEL_FOLDER --dataset AMOS=Dataset218_AMOS,labels=AMOS -o"
        " crosseval"
    )
    interrupted: ClassVar = RESUMES

    file: tuple[str, ...] | None = argument(
        default=None,
        nargs="?",
        metavar="FILE",
        help="YAML or JSON file with models, datasets and what follows here",
    )
    models: tuple[str, ...] = argument(
        "--model",
        action="append",
        default=(),
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help=(
            "a model folder of nnU-Net v2; keys: fold (0, 0+1, all), checkpoint, mirroring,"
            " step_size, labels. Again for more"
        ),
    )
    datasets: tuple[str, ...] = argument(
        "--dataset",
        action="append",
        default=(),
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help=(
            "a raw dataset of nnU-Net with references; keys: labels (a system's name or file), part"
            " (Tr, Ts), images, references. Again for more"
        ),
    )
    out: str | None = argument(
        "-o", default=None, metavar="FOLDER", help="of everything that is written; resumes in it"
    )
    classes: str | None = argument(
        "--classes",
        default=None,
        type=_classes,
        metavar="WHICH",
        help=(
            "shared: those of all models and datasets; pair: those of each pair; or names, with"
            " commas (if not given: shared)"
        ),
    )
    tolerance: float | None = argument(
        "--tolerance",
        default=None,
        type=float,
        metavar="MM",
        help="of the NSD where FLARE22's protocol has none (if not given: 2)",
    )
    sliced: bool = argument(
        "--sliced",
        action="store_true",
        help="score aorta, vena cava, esophagus between the reference's end slices alone",
    )
    resample: bool = argument(
        "--resample",
        action="store_true",
        help="resample predictions to their references where the voxels differ",
    )
    device: str = argument(
        "--device",
        "-device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="auto takes a GPU if there is one",
    )
    processes: int | None = argument(
        "-np", default=None, type=int, metavar="N", help="processes; half the cores if not given"
    )
    check: bool = argument(
        "--check", action="store_true", help="check everything, say what would be scored, and stop"
    )

    def run(self) -> int:
        from stunet_plugin.crosseval.run import Run, run_crosseval

        return run_crosseval(Run.from_arguments(self))
