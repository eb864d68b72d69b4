"""Is a training in several processes the training of one? On the CPU over gloo, through torchrun
and the launcher, at tiny size.

Prepares phantoms with the stock command, then trains FixedBatchesTrainer (the same global batches
whatever the number of processes) in one process with ``nnUNetv2_train`` and in several with
``torchrun ... -m stunet_plugin.launch``, with DDP and sharded, on one machine and two pretended
ones, resumed with another number of processes, and with one process killed. Then every kind of
network through nnU-Net's own data loading and final validation in two processes. Writes the largest
differences as a JSON:

    python tests/tools/two_processes.py --work /tmp/two_processes --out
    tests/tools/results/two_processes.json

Takes minutes: each process imports torch and nnU-Net. Exit codes: 0 all as it should be, 1
    something is not (the JSON says what).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from launched import (
    BATCH,
    FIXED_BATCHES,
    PATCH,
    PLANS,
    Launch,
    differences,
    read,
    same_weights_everywhere,
    torchrun,
    write_plans,
)

from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import host_version, trainers_folder
from stunet_plugin.utils.files import write_atomically

DATASET = "901"
NAME = f"Dataset{DATASET}_Phantoms"
NETWORK_PLANS, NETWORK_PATCH = "NetworkPlans", (32, 32, 32)
"""Of the trainings as they are; PCT-Net and FMUNet reduce each axis by up to 16."""
LOSS_TOLERANCE = 1e-3
WEIGHT_TOLERANCE = 1e-3
"""In float32, sums in another order drift apart from step to step; a wrong average or a missed
batch is off by far more."""
NETWORKS = (
    "STUNetTrainer_tiny",
    "PCTNetTrainer",
    "FMUNetTrainer",
    "VolumeFusionTrainer_STUNet_tiny",
    "VolumeFusionTrainer",
)


@dataclass(frozen=True)
class Scenario:
    """A training of the fixed batches in several processes.

    Attributes:
        name: in the results, and of its folder.
        machines, processes: pretended machines, and processes on each.
        sharded: with STUNET_SHARD=1.
    """

    name: str
    machines: int
    processes: int
    sharded: bool = False


SCENARIOS = (
    Scenario("2 processes", 1, 2),
    Scenario("4 processes", 1, 4),
    Scenario("2 machines with 1 process each", 2, 1),
    Scenario("2 machines with 2 processes each", 2, 2),
    Scenario("2 processes, sharded", 1, 2, sharded=True),
    Scenario("4 processes, sharded", 1, 4, sharded=True),
)


class Runs:
    """A work folder with the phantoms, and the trainings in it."""

    def __init__(self, work: Path, epochs: int, iterations: int) -> None:
        self.work, self.epochs = work, epochs
        left_out = ("nnUNet_", "STUNET_", "FIXED_BATCHES_")
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(left_out)
        }
        self.environment = {
            **inherited,
            "nnUNet_raw": str(work / "nnUNet_raw"),
            "nnUNet_preprocessed": str(work / "nnUNet_preprocessed"),
            "nnUNet_extTrainer": os.pathsep.join((str(FIXED_BATCHES), str(trainers_folder()))),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "0",
            "OMP_NUM_THREADS": "1",
            "STUNET_EPOCHS": str(epochs),
            "STUNET_ITERATIONS": str(iterations),
            "STUNET_VAL_ITERATIONS": "1",
            "STUNET_SEED": "1",
        }

    def prepare(self) -> None:
        """Make the phantoms, planned and preprocessed, unless they are there."""
        dataset = self.work / "nnUNet_preprocessed" / NAME
        if not (dataset / f"{PLANS}.json").is_file():
            for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
                (self.work / folder).mkdir(parents=True, exist_ok=True)
            if not (self.work / "nnUNet_raw" / NAME).is_dir():
                write_dataset(self.work / "nnUNet_raw" / NAME, num_cases=6, seed=1)
            one_each = ("-npfp", "1", "-np", "1")
            self.stock(
                "nnUNetv2_plan_and_preprocess",
                "-d",
                DATASET,
                "-c",
                "3d_fullres",
                *one_each,
                nnUNet_n_proc_DA="1",
            )
            write_plans(dataset, NETWORK_PLANS, NETWORK_PATCH)
            write_plans(dataset)

    def stock(self, command: str, *arguments: str, **environment: str) -> None:
        """Run a stock command."""
        print("+", command, *arguments, flush=True)
        subprocess.run(
            [find_command(command), *arguments],
            env={**self.environment, **environment},
            cwd=self.work,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def results(self, name: str) -> Path:
        """The folder of a training's results."""
        return self.work / "results" / re.sub(r"\W+", "_", name)

    def arguments(self, trainer: str = "FixedBatchesTrainer", plans: str = PLANS) -> list[str]:
        return [DATASET, "3d_fullres", "0", "-tr", trainer, "-p", plans, "-device", "cpu"]

    def model(self, name: str, trainer: str = "FixedBatchesTrainer", plans: str = PLANS) -> Path:
        return self.results(name) / NAME / f"{trainer}__{plans}__3d_fullres" / "fold_0"

    def launch(
        self, scenario: Scenario, name: str, arguments: Sequence[str], **environment: str
    ) -> Launch:
        """Train in several processes, with the results under a name."""
        print(
            f"+ {name}: {scenario.machines} machine(s) with {scenario.processes} process(es):",
            *arguments,
            flush=True,
        )
        if "--c" not in arguments:
            shutil.rmtree(self.results(name), ignore_errors=True)
        variables = {
            **self.environment,
            "nnUNet_results": str(self.results(name)),
            "STUNET_SHARD": str(int(scenario.sharded)),
            **environment,
        }
        return torchrun(
            arguments, variables, self.work / "logs", scenario.machines, scenario.processes
        )

    def alone(self) -> dict[str, Any]:
        """Train in one process with the stock command, once."""
        file = self.model("alone") / "checkpoint_final.pth"
        if not file.is_file():
            self.stock(
                "nnUNetv2_train", *self.arguments(), nnUNet_results=str(self.results("alone"))
            )
        return read(file)


def compared(runs: Runs, scenario: Scenario) -> dict[str, Any]:
    """A whole training in several processes against one in one."""
    launch = runs.launch(scenario, scenario.name, runs.arguments())
    if launch.codes != [0] * scenario.machines:
        return failed(launch)
    found = differences(runs.alone(), read(runs.model(scenario.name) / "checkpoint_final.pth"))
    processes = scenario.machines * scenario.processes
    same = (
        None if scenario.sharded else same_weights_everywhere(runs.model(scenario.name), processes)
    )
    return {
        **judged(found),
        "same_weights_on_all_processes": same,
        "passed": agrees(found) and same is not False,
    }


def killed_and_resumed(runs: Runs, first: Scenario, second: Scenario) -> dict[str, Any]:
    """One process kills itself halfway; the training is resumed in other processes."""
    name = f"{first.name} killed, on in {second.name}"
    launch = runs.launch(
        first,
        name,
        [*runs.arguments(), "--timeout", "10"],
        FIXED_BATCHES_KILL=f"1:{runs.epochs // 2}",
    )
    stopped = {
        "exit_codes_after_the_kill": launch.codes,
        "seconds_from_start_to_end": round(launch.seconds, 1),
        "named_by_torchrun": "SIGKILL" in launch.output,
        "others_say_why_they_stop": "All processes of this training end" in launch.output,
    }
    resumed = runs.launch(second, name, [*runs.arguments(), "--c"])
    if resumed.codes != [0] * second.machines:
        return {**stopped, **failed(resumed)}
    found = differences(runs.alone(), read(runs.model(name) / "checkpoint_final.pth"))
    ended = all(code not in (None, 0) for code in launch.codes)
    return {**stopped, **judged(found), "passed": ended and agrees(found)}


def validated(runs: Runs, trainer: str, sharded: bool) -> dict[str, Any]:
    """nnU-Net's own loading, training and final validation in two processes."""
    scenario = Scenario(f"{trainer}{' sharded' * sharded} as it is", 1, 2, sharded)
    launch = runs.launch(
        scenario, scenario.name, runs.arguments(trainer, NETWORK_PLANS), STUNET_EPOCHS="1"
    )
    if launch.codes != [0]:
        return failed(launch)
    folder = runs.model(scenario.name, trainer, NETWORK_PLANS)
    written = sorted(path.name for path in (folder / "validation").iterdir())
    expected = "pretext_score.json" if trainer.startswith("VolumeFusion") else "summary.json"
    return {
        "validation": written,
        "passed": expected in written and (folder / "checkpoint_final.pth").is_file(),
    }


def failed(launch: Launch) -> dict[str, Any]:
    return {"passed": False, "exit_codes": launch.codes, "end_of_output": launch.output[-3000:]}


def agrees(found: dict[str, float]) -> bool:
    return (
        max(found["train_losses"], found["val_losses"]) < LOSS_TOLERANCE
        and found["weights"] < WEIGHT_TOLERANCE
    )


def judged(found: dict[str, float]) -> dict[str, float]:
    """Round differences to what says something."""
    return {f"largest_difference_of_{key}": float(f"{value:.2g}") for key, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare trainings in several processes with one in one process."
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for data, results and logs; what is there is used again",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=5, help="per epoch")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only the runs whose name has this in it"
    )
    options = parser.parse_args(arguments)
    runs = Runs(options.work.resolve(), options.epochs, options.iterations)
    runs.prepare()
    two, two_machines, four_sharded, two_sharded = (
        SCENARIOS[0],
        SCENARIOS[2],
        SCENARIOS[5],
        SCENARIOS[4],
    )
    work = {scenario.name: (compared, scenario) for scenario in SCENARIOS}
    work["killed on 2 machines, resumed in 4 processes, sharded"] = (
        killed_and_resumed,
        two_machines,
        four_sharded,
    )
    work["killed in 4 processes, sharded, resumed in 2 processes"] = (
        killed_and_resumed,
        four_sharded,
        two,
    )
    work["killed in 2 processes, sharded, resumed in 2 processes, sharded"] = (
        killed_and_resumed,
        two_sharded,
        two_sharded,
    )
    for trainer in NETWORKS:
        work[f"{trainer}, final validation"] = (validated, trainer, False)
    work["STUNetTrainer_tiny, sharded, final validation"] = (validated, "STUNetTrainer_tiny", True)
    work["VolumeFusionTrainer_STUNet_tiny, sharded, final validation"] = (
        validated,
        "VolumeFusionTrainer_STUNet_tiny",
        True,
    )
    results: dict[str, Any] = {}
    for name, (run, *details) in work.items():
        if options.only in name:
            results[name] = run(runs, *details)
            print(json.dumps({name: results[name]}), flush=True)
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nnunetv2": host_version(),
        },
        "training": {
            "epochs": options.epochs,
            "iterations": options.iterations,
            "batch": BATCH,
            "patch": PATCH,
            "size": "tiny",
        },
        "tolerance": {"losses, relative": LOSS_TOLERANCE, "weights, absolute": WEIGHT_TOLERANCE},
        "results": results,
    }
    write_atomically(options.out, json.dumps(record, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
