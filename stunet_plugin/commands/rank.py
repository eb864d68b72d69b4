"""``stunet rank``: pretrained weights ranked for a labelled dataset."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, device_option, flag, option, required


@dataclass(frozen=True)
class Rank(Command):
    """Rank pretrained weights for a labelled dataset without training them."""

    command = "rank"
    example = (
        "stunet rank ct=MODEL_FOLDER mr=checkpoint_final.pth random -d 4 -p nnUNetPlans --json"
        " ranking.json"
    )
    interrupted = "Nothing was written; start the same command again."
    notes = (
        "\n\nHow far to trust it: on hippocampus with tiny networks, `heads` put the strong weights"
        " first with every draw of cases; CCFV and its inverse changed their order. None tells weak"
        " weights apart. Few candidates: docs/experiments/few_shot.md, ranking.md."
    )

    weights: tuple[str, ...] = required(
        nargs="+",
        metavar="[NAME=]WEIGHTS",
        help="model folder of nnU-Net, a checkpoint of one, or pretrained weights; 'random' adds"
        " random weights for comparison, 'random:TRAINER' those of a trainer's network (with -p)",
    )
    dataset: str = required("-d", help="labelled dataset in nnUNet_raw: ID, name or path")
    plans: str | None = option(
        "-p",
        help="plans of the dataset to fine-tune with; if not given, each model sees the images as"
        " in its own training",
    )
    configuration: str = option("-c", default="3d_fullres", help="of the plans given with -p")
    cases: int = option("--cases", default=10, metavar="N", help="how many, drawn with the seed")
    names: tuple[str, ...] | None = option(
        "--names", nargs="+", metavar="CASE", help="these cases instead, those of a fold perhaps"
    )
    levels: int | None = option(
        "--levels", metavar="N", help="finest levels of the decoder; 3 if not given"
    )
    seed: int = option(
        "--seed", default=0, metavar="N", help="of the drawn cases, voxels and random weights"
    )
    step_size: float = option(
        "--step-size", default=0.5, metavar="X", help="of the sliding window, in patches"
    )
    published_sums: bool = flag(
        "--published-sums", "add distances up as the published script does, not average"
    )
    score: str = option(
        "--score",
        default="heads",
        choices=("heads", "inverse", "ccfv"),
        help="to rank by; all are printed. heads: Dice of a head fitted to the features, on"
        " held-out cases; ccfv: as in the published code; inverse: CCFV with the inverse energy,"
        " which does not depend on the scale of the features",
    )
    device: str = device_option()
    json: str | None = option("--json", metavar="FILE", help="write everything that was computed")
    figure: str | None = option("--figure", metavar="FILE", help="write a bar chart, .png")

    def run(self) -> int:
        # Without torch, so that a slip is told at once.
        from stunet_plugin.ranking.options import find_inputs

        inputs = find_inputs(self)
        from stunet_plugin.ranking.run import run_rank

        return run_rank(self, inputs)
