"""``stunet merge-datasets``: one dataset of several with different labels."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, flag, option, repeated, required


@dataclass(frozen=True)
class MergeDatasets(Command):
    """Make one dataset of several with different labels, for joint training."""

    command = "merge-datasets"
    example = (
        "stunet merge-datasets 4 910 -d 920 -n Joint --train-only 910 &&"
        " nnUNetv2_plan_and_preprocess -d 920 -c 3d_fullres"
    )
    runs = "stunet_plugin.datasets.merge:run_merge"
    interrupted = RESUMES

    datasets: tuple[str, ...] = required(
        nargs="+",
        metavar="DATASET[=LABELS]",
        help="datasets in nnUNet_raw, by ID, name or path; LABELS says what their labels mean (a"
        " published label system by name, or a file) where their dataset.json does not",
    )
    dataset_id: int = required("-d", metavar="ID", help="ID of the new dataset, 1 to 999")
    name: str = option("-n", default="Merged", metavar="NAME", help="name of the new dataset")
    copy: bool = flag("--copy", "copy files instead of linking them")
    classes: tuple[str, ...] | None = option(
        "--classes", nargs="+", metavar="CLASS", help="to learn; if not given, all of all datasets"
    )
    not_shown: tuple[str, ...] = repeated(
        "--not-shown",
        metavar="DATASET=CLASS,...",
        help="classes that no image of a dataset shows, so that what it does not annotate need not"
        " become ignore; give the option again for each dataset",
    )
    train_only: tuple[str, ...] = repeated(
        "--train-only",
        metavar="DATASET",
        help="cases of this dataset (pseudo-labels, perhaps) are trained on in every fold and"
        " validated on in none",
    )
    channel_names: tuple[str, ...] | None = option(
        "--channel-names", nargs="+", metavar="NAME", help="of the new dataset, where they differ"
    )
    seed: int = option("--seed", default=0, metavar="N", help="of the folds")
