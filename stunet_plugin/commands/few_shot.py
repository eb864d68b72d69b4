"""``stunet few-shot``: weights compared by fine-tuning each on a few labelled cases."""

from dataclasses import dataclass

from stunet_plugin.commands.command import RESUMES, Command, device_option, flag, option, required


@dataclass(frozen=True)
class FewShot(Command):
    """Compare pretrained weights by fine-tuning each on a few labelled cases, several draws of
    them, with the stock trainer and a fixed short budget; tables, tests, a learning curve."""

    command = "few-shot"
    example = "stunet few-shot ct=MODEL_FOLDER fusion=checkpoint_final.pth random -d 4 -o few_shot"
    interrupted = "Finished trainings are kept. " + RESUMES
    failure = "one of the commands failed, or the disk is full"

    weights: tuple[str, ...] = required(
        nargs="+",
        metavar="[NAME=]WEIGHTS",
        help="as for `stunet fine-tune`: model folder of nnU-Net, or a checkpoint; 'random' adds a"
        " training from scratch of the same network",
    )
    dataset: str = required(
        "-d", metavar="DATASET", help="labelled dataset in nnUNet_raw: ID, name"
    )
    out: str = required("-o", metavar="FOLDER", help="for everything; resumes in it")
    shots: tuple[int, ...] = option(
        "--shots", nargs="+", default=(1, 5, 10), metavar="K", help="numbers of labelled cases"
    )
    draws: int = option("--draws", default=3, metavar="N", help="of each number of labelled cases")
    test: int = option(
        "--test", default=20, metavar="N", help="cases to test on, drawn by the seed"
    )
    test_names: tuple[str, ...] | None = option(
        "--test-names", nargs="+", metavar="CASE", help="these cases instead"
    )
    train_names: tuple[str, ...] | None = option(
        "--train-names", nargs="+", metavar="CASE", help="draw labelled cases from these alone"
    )
    iterations: int = option(
        "--iterations", default=250, metavar="N", help="of each training, in ten epochs"
    )
    plans: str | None = option(
        "-p", metavar="PLANS", help="plans of the dataset; if not given, as `stunet fine-tune` does"
    )
    rank: bool = flag("--rank", "add the scores of `stunet rank`, and how far they agree")
    seed: int = option("--seed", default=0, metavar="N", help="of test cases and draws")
    check: bool = flag("--check", "plan, preprocess, estimate the time, and stop")
    processes: int = option("-np", default=2, metavar="N", help="processes for planning and data")
    device: str = device_option()

    def run(self) -> int:
        # Without torch, so that a slip is told at once.
        from stunet_plugin.few_shot.inputs import find_inputs

        inputs = find_inputs(self)
        from stunet_plugin.few_shot.run import run_few_shot

        return run_few_shot(self, inputs)
