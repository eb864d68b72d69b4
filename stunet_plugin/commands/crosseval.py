"""``stunet crosseval``: models compared on datasets, on the classes they share."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, device_option, flag, option, repeated


def _classes(text: str) -> str | tuple[str, ...]:
    return text if text in ("shared", "pair") else _names(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class Crosseval(Command):
    """Compare models, or finished predictions, across datasets on the classes that they share:
    tables, tests, pictures, a report."""

    command = "crosseval"
    example = "stunet crosseval --model A=FOLDER --dataset AMOS=Dataset218_AMOS,labels=AMOS -o out"
    runs = "stunet_plugin.crosseval.run:run_crosseval"
    interrupted = RESUMES

    file: str | None = option(
        nargs="?", metavar="FILE", help="YAML or JSON file with models, datasets and these options"
    )
    models: tuple[str, ...] = repeated(
        "--model",
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help="model folder of nnU-Net v2; keys: fold (0, 0+1, all), checkpoint, mirroring,"
        " step_size, labels; may be repeated",
    )
    predictions: tuple[str, ...] = repeated(
        "--predictions",
        metavar="NAME=FOLDER[,labels=...]",
        help="finished label maps of any tool, FOLDER/CASE.nii.gz, or FOLDER/DATASET/CASE.nii.gz"
        " with several datasets; may be repeated",
    )
    predicted_only: bool = flag(
        "--predicted-only", "leave out cases that a folder of --predictions has nothing for"
    )
    datasets: tuple[str, ...] = repeated(
        "--dataset",
        metavar="NAME=FOLDER[,KEY=VALUE...]",
        help="raw dataset of nnU-Net with references; keys: labels (a system's name or file), part"
        " (Tr, Ts), images, references; may be repeated",
    )
    references: tuple[str, ...] = repeated(
        "--references",
        metavar="[NAME=]FOLDER[,labels=...]",
        help="label maps to compare --predictions with, where there is no dataset; may be repeated",
    )
    out: str | None = option("-o", metavar="FOLDER", help="for all results; resumes in it")
    classes: str | tuple[str, ...] | None = option(
        "--classes",
        type=_classes,
        metavar="WHICH",
        help="shared: those of all models and datasets; pair: those of each pair; or names with"
        " commas (if not given: shared)",
    )
    tolerance: float | None = option(
        "--tolerance", metavar="MM", help="of the NSD where FLARE22 has none (if not given: 2)"
    )
    sliced: bool = flag(
        "--sliced", "score aorta, vena cava, esophagus between the reference's end slices alone"
    )
    lesions: tuple[str, ...] | None = option(
        "--lesions",
        type=_names,
        metavar="NAMES",
        help="classes to count as lesions, too (those named as a lesion, tumour, ... are)",
    )
    calibration: bool = flag(
        "--calibration",
        "whether models are right as often as they are confident, and the threshold for `stunet"
        " pseudo-label`; keeps maps of their confidence",
    )
    resample: bool = flag("--resample", "resample predictions to references where voxels differ")
    num_parts: int = option("-num_parts", default=1, metavar="N", help="for a job array: N jobs")
    part_id: int = option("-part_id", default=0, metavar="I", help="number of this job, 0 first")
    device: str = device_option()
    processes: int | None = option("-np", metavar="N", help="if not given, half the cores")
    check: bool = flag("--check", "check everything, say what would be scored, and stop")
