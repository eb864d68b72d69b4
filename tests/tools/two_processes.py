"""Parity of trainings in several processes with those in one, on the CPU over gloo, at tiny size.

Prepares phantoms with the stock command, then trains FixedBatchesTrainer (the same global batches
whatever the number of processes) in one process with ``nnUNetv2_train`` and in several with
``torchrun ... -m stunet_plugin.launch``, with DDP and sharded, on one machine and two pretended
ones, resumed with another number of processes, and with one process killed. Then every kind of
network through nnU-Net's own data loading and final validation in two processes. Takes minutes:

    python tests/tools/two_processes.py --work /tmp/two_processes --out two_processes.json

Exit codes: 0 all as it should be, 1 something is not (the JSON says what).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from stunet_plugin.demo.phantom import write_dataset
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import host_version, trainers_folder
from stunet_plugin.utils.files import write_atomically

FIXED_BATCHES = Path(__file__).resolve().parent / "fixed_batches"
"""Folder of FixedBatchesTrainer, for ``nnUNet_extTrainer``."""
PLANS = "FixedBatchesPlans"
PATCH = (16, 32, 32)
BATCH = 4
DATASET = "901"
NAME = f"Dataset{DATASET}_Phantoms"
NETWORK_PLANS, NETWORK_PATCH = "NetworkPlans", (32, 32, 32)
"""Of nnU-Net's own loading; PCT-Net and FMUNet reduce each axis by up to 16."""
TOLERANCE = 1e-3
"""Of losses (relative) and weights: in float32, sums in another order drift apart from step to
step; a wrong average or a missed batch is off by far more."""
FIXED, PRETEXT = "FixedBatchesTrainer", "VolumeFusionTrainer_STUNet_tiny"
PROMPTS = "PromptTrainer_STUNet_tiny"
NETWORKS = (
    *("STUNetTrainer_tiny", "PCTNetTrainer", "FMUNetTrainer", PRETEXT, "VolumeFusionTrainer"),
    PROMPTS,
)
SCORES = {
    PRETEXT: "pretext_score.json",
    "VolumeFusionTrainer": "pretext_score.json",
    PROMPTS: "interaction_curve.json",
}
"""What their final validation writes, if not summary.json."""
KEPT_OUT = ("nnUNet_", "STUNET_", "FIXED_BATCHES_")


def training(trainer: str, plans: str) -> str:
    return f"{DATASET} 3d_fullres 0 -tr {trainer} -p {plans} -device cpu"


TRAINING = training(FIXED, PLANS)


@dataclass(frozen=True)
class Launch:
    """What came of a training: torchrun's exit code on each machine (None: it had to be stopped),
    what all wrote, and the seconds until the last one ended."""

    codes: list[int | None]
    output: str
    seconds: float


def torchrun(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    machines: int = 1,
    processes: int = 2,
    limit: float = 600,
) -> Launch:
    """Start ``stunet_plugin.launch`` as if on several machines, ``processes`` on each, and wait;
    outputs go to the folder. What runs after ``limit`` seconds is stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    group = str(uuid.uuid4())
    shape = f"--nnodes {machines} --nproc-per-node {processes}"
    meeting = f"--rdzv-backend c10d --rdzv-endpoint localhost:{get_free_port()} --rdzv-id {group}"
    command = f"-m torch.distributed.run {shape} {meeting} -m stunet_plugin.launch"
    words = [sys.executable, *command.split(), *arguments]
    # What a killed process had in its buffers would be lost.
    variables = {**environment, "PYTHONUNBUFFERED": "1"}
    logs = [folder / f"{group}_{machine}.txt" for machine in range(machines)]
    start, started = time.monotonic(), []
    for log in logs:
        with log.open("w") as output:
            how: dict[str, Any] = {"stdout": output, "stderr": output, "stdin": subprocess.DEVNULL}
            started.append(subprocess.Popen(words, env=variables, cwd=folder, **how))
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.0, start + limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            # torchrun ends its processes before itself.
            process.terminate()
            process.wait()
            codes.append(None)
    output = "\n".join(log.read_text(errors="replace") for log in logs)
    return Launch(codes, output, time.monotonic() - start)


def write_plans(dataset: Path, name: str = PLANS, patch: Sequence[int] = PATCH) -> None:
    """Put plans with a small patch and a batch that four processes can split beside the others."""
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["plans_name"] = name
    plans["configurations"]["3d_fullres"].update({"patch_size": list(patch), "batch_size": BATCH})
    write_atomically(dataset / f"{name}.json", json.dumps(plans, indent=2))


def read(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False)
    return content


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences of two checkpoints: losses of all epochs (relative), weights
    and momentum (absolute). Raises ValueError if names, epochs or kinds of tensors differ."""
    found = {}
    for key in ("train_losses", "val_losses"):
        pairs = zip(first["logging"][key], second["logging"][key], strict=True)
        found[key] = float(max(abs(a - b) / abs(a) for a, b in pairs))
    weights = _largest_difference(first["network_weights"], second["network_weights"])
    momentum = _largest_difference(_momentum(first), _momentum(second))
    return {**found, "weights": weights, "momentum": momentum}


def same_weights_everywhere(model: Path, ranks: int) -> bool:
    """Say whether all processes had the same weights after every epoch, to the bit."""
    written = [(model / f"weights_of_rank_{rank}.txt").read_text() for rank in range(ranks)]
    return len(set(written)) == 1


def _largest_difference(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> float:
    plain = all(type(value) is torch.Tensor for value in second.values())
    if first.keys() != second.keys() or not plain:
        raise ValueError("The checkpoints hold other tensors.")
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def _momentum(checkpoint: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    states = checkpoint["optimizer_state"]["state"]
    return {number: values["momentum_buffer"] for number, values in states.items()}


@dataclass(frozen=True)
class Scenario:
    """Processes of a training: pretended machines, and processes on each."""

    name: str
    machines: int
    processes: int
    sharded: bool = False


TWO, FOUR = Scenario("2 processes", 1, 2), Scenario("4 processes", 1, 4)
TWO_MACHINES = Scenario("2 machines with 2 processes each", 2, 2)
TWO_SHARDED = Scenario("2 processes, sharded", 1, 2, sharded=True)
FOUR_SHARDED = Scenario("4 processes, sharded", 1, 4, sharded=True)
ONE_EACH = Scenario("2 machines with 1 process each", 2, 1)
SCENARIOS = (TWO, FOUR, ONE_EACH, TWO_MACHINES, TWO_SHARDED, FOUR_SHARDED)
KILLED = ((TWO_MACHINES, FOUR_SHARDED), (FOUR_SHARDED, TWO), (TWO_SHARDED, TWO_SHARDED))
"""One process of the first is killed, then the second resumes the training."""


class Runs:
    """A work folder with the phantoms, and the trainings in it."""

    def __init__(self, work: Path, epochs: int, iterations: int) -> None:
        self.work, self.epochs = work, epochs
        self.preprocessed = work / "nnUNet_preprocessed" / NAME
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(KEPT_OUT)},
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
        if (self.preprocessed / f"{PLANS}.json").is_file():
            return
        raw = self.work / "nnUNet_raw" / NAME
        self.preprocessed.parent.mkdir(parents=True, exist_ok=True)
        if not raw.is_dir():
            raw.parent.mkdir(parents=True, exist_ok=True)
            write_dataset(raw, num_cases=6, seed=1)
        words = f"nnUNetv2_plan_and_preprocess -d {DATASET} -c 3d_fullres -npfp 1 -np 1"
        self.stock(words, nnUNet_n_proc_DA="1")
        write_plans(self.preprocessed, NETWORK_PLANS, NETWORK_PATCH)
        write_plans(self.preprocessed)

    def stock(self, line: str, **environment: str) -> None:
        """Run a stock command."""
        print("+", line, flush=True)
        command, *words = line.split()
        variables, quiet = self.environment | environment, subprocess.DEVNULL
        found = [find_command(command), *words]
        subprocess.run(found, env=variables, cwd=self.work, check=True, stdout=quiet)

    def results(self, name: str) -> Path:
        """Return the folder of a training's results."""
        return self.work / "results" / re.sub(r"\W+", "_", name)

    def model(self, name: str, trainer: str = FIXED, plans: str = PLANS) -> Path:
        return self.results(name) / NAME / f"{trainer}__{plans}__3d_fullres" / "fold_0"

    def launch(
        self, scenario: Scenario, name: str, options: str = "", how: str = TRAINING, **more: str
    ) -> Launch:
        """Train in several processes, with the results under a name."""
        print(f"+ {name}: {scenario.name}", how, options, flush=True)
        shard = str(int(scenario.sharded))
        variables = {"nnUNet_results": str(self.results(name)), "STUNET_SHARD": shard, **more}
        if "--c" not in options:
            shutil.rmtree(self.results(name), ignore_errors=True)
        words, machines = [*how.split(), *options.split()], (scenario.machines, scenario.processes)
        return torchrun(words, self.environment | variables, self.work / "logs", *machines)

    def against_one(self, name: str) -> dict[str, Any]:
        """Compare a finished training with that in one process, which is run once."""
        alone = self.model("alone") / "checkpoint_final.pth"
        if not alone.is_file():
            self.stock(f"nnUNetv2_train {TRAINING}", nnUNet_results=str(self.results("alone")))
        found = differences(read(alone), read(self.model(name) / "checkpoint_final.pth"))
        shown = {
            f"largest_difference_of_{key}": float(f"{value:.2g}") for key, value in found.items()
        }
        compared = (found["train_losses"], found["val_losses"], found["weights"])
        return {**shown, "passed": max(compared) < TOLERANCE}


def failed(launch: Launch) -> dict[str, Any]:
    return {"passed": False, "exit_codes": launch.codes, "end_of_output": launch.output[-3000:]}


def compare(runs: Runs, scenario: Scenario) -> dict[str, Any]:
    """Compare a whole training in several processes with one in one."""
    launch = runs.launch(scenario, scenario.name)
    if launch.codes != [0] * scenario.machines:
        return failed(launch)
    found = runs.against_one(scenario.name)
    ranks = scenario.machines * scenario.processes
    if not scenario.sharded:
        same = same_weights_everywhere(runs.model(scenario.name), ranks)
        found |= {"same_weights_on_all_processes": same, "passed": found["passed"] and same}
    return found


def kill_and_resume(runs: Runs, first: Scenario, second: Scenario) -> dict[str, Any]:
    """Let one process kill itself halfway, and resume the training in other processes."""
    name = f"{first.name} killed, resumed in {second.name}"
    kill = f"1:{runs.epochs // 2}"
    launch = runs.launch(first, name, "--timeout 10", FIXED_BATCHES_KILL=kill)
    stopped = {
        "exit_codes_after_the_kill": launch.codes,
        "seconds_from_start_to_end": round(launch.seconds, 1),
        "named_by_torchrun": "SIGKILL" in launch.output,
        "others_say_why_they_stop": "All processes of this training end" in launch.output,
    }
    resumed = runs.launch(second, name, "--c")
    if resumed.codes != [0] * second.machines:
        return {**stopped, **failed(resumed)}
    found = runs.against_one(name)
    ended = all(code not in (None, 0) for code in launch.codes)
    return {**stopped, **found, "passed": ended and found["passed"]}


def validate(runs: Runs, trainer: str, sharded: bool = False) -> dict[str, Any]:
    """Run nnU-Net's own loading, training and final validation in two processes."""
    scenario = Scenario(f"{trainer}{' sharded' * sharded} as it is", 1, 2, sharded)
    how = training(trainer, NETWORK_PLANS)
    launch = runs.launch(scenario, scenario.name, how=how, STUNET_EPOCHS="1")
    if launch.codes != [0]:
        return failed(launch)
    folder = runs.model(scenario.name, trainer, NETWORK_PLANS)
    written = sorted(path.name for path in (folder / "validation").iterdir())
    whole = (folder / "checkpoint_final.pth").is_file()
    passed = whole and SCORES.get(trainer, "summary.json") in written
    return {"validation": written, "passed": passed}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare trainings in several processes with one in one process."
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for everything; used again if there")
    add("--out", type=Path, required=True, help="JSON with the results")
    add("--epochs", type=int, default=4)
    add("--iterations", type=int, default=5, help="per epoch")
    add("--only", metavar="TEXT", default="", help="only runs whose name has this in it")
    options = parser.parse_args(arguments)
    runs = Runs(options.work.resolve(), options.epochs, options.iterations)
    runs.prepare()
    work = {scenario.name: partial(compare, runs, scenario) for scenario in SCENARIOS}
    for first, second in KILLED:
        name = f"killed in {first.name}, resumed in {second.name}"
        work[name] = partial(kill_and_resume, runs, first, second)
    for trainer in NETWORKS:
        work[f"{trainer}, final validation"] = partial(validate, runs, trainer)
    for trainer in (NETWORKS[0], PRETEXT):
        work[f"{trainer}, sharded, final validation"] = partial(validate, runs, trainer, True)
    results = {}
    for name in (name for name in work if options.only in name):
        results[name] = work[name]()
        print(json.dumps({name: results[name]}), flush=True)
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"torch": torch.__version__, "nnunetv2": host_version()},
        "training": {"epochs": options.epochs, "iterations": options.iterations}
        | {"batch": BATCH, "patch": PATCH, "size": "tiny"},
        "tolerance": TOLERANCE,
        "results": results,
    }
    write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
