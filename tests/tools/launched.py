"""Starting trainings through torchrun, and comparing what they leave: for two_processes.py and
tests/test_launch.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stunet_plugin.utils.files import write_atomically

FIXED_BATCHES = Path(__file__).resolve().parent / "fixed_batches"
"""Folder of FixedBatchesTrainer, for ``nnUNet_extTrainer``."""
PLANS = "FixedBatchesPlans"
PATCH = (16, 32, 32)
BATCH = 4


@dataclass(frozen=True)
class Launch:
    """What came of a training.

    Attributes:
        codes: exit code of torchrun on each (pretended) machine; None where it had to be stopped.
        outputs: what each wrote, standard output and error together.
        seconds: until the last one ended.
    """

    codes: list[int | None]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


def torchrun(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    machines: int = 1,
    processes: int = 2,
    limit: float = 600,
) -> Launch:
    """Start ``stunet_plugin.launch`` in processes, as if on several machines, and wait for all of
    them.

    Args:
        arguments: of the launcher.
        environment: of all processes.
        folder: working folder, where outputs go too.
        machines, processes: how many, and on each.
        limit: seconds after which what still runs is stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = str(uuid.uuid4())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(machines),
        "--nproc-per-node",
        str(processes),
    ]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{_free_port()}",
        "--rdzv-id",
        group,
    ]
    command += ["-m", "stunet_plugin.launch", *arguments]
    logs = [folder / f"{group}_{machine}.txt" for machine in range(machines)]
    # What a killed process had in its buffers would be lost.
    variables = {**environment, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    started = []
    for log in logs:
        with log.open("w") as output:
            started.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    cwd=folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.0, start + limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            # torchrun ends its processes before itself.
            process.terminate()
            process.wait()
            codes.append(None)
    return Launch(
        codes, [log.read_text(errors="replace") for log in logs], time.monotonic() - start
    )


def write_plans(dataset: Path, name: str = PLANS, patch: Sequence[int] = PATCH) -> None:
    """Put plans with a small patch and a batch that four processes can split beside those of a
    preprocessed dataset."""
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["plans_name"] = name
    plans["configurations"]["3d_fullres"].update({"patch_size": list(patch), "batch_size": BATCH})
    write_atomically(dataset / f"{name}.json", json.dumps(plans, indent=2))


def read(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False)
    return content


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest differences of two checkpoints: losses of all epochs (relative), weights
    and momentum (absolute).

    Raises:
        ValueError: they differ in epochs, names or shapes, or hold something other than plain
            tensors.
    """
    losses = {}
    for key in ("train_losses", "val_losses"):
        pairs = list(zip(first["logging"][key], second["logging"][key], strict=True))
        losses[key] = max(abs(a - b) / abs(a) for a, b in pairs)
    return {
        **{key: float(value) for key, value in losses.items()},
        "weights": _largest_difference(first["network_weights"], second["network_weights"]),
        "momentum": _largest_difference(_momentum(first), _momentum(second)),
    }


def same_weights_everywhere(model: Path, ranks: int) -> bool:
    """Say whether all processes had bit-identical weights after every epoch, by what
    FixedBatchesTrainer wrote."""
    written = [(model / f"weights_of_rank_{rank}.txt").read_text() for rank in range(ranks)]
    return len(set(written)) == 1


def _largest_difference(
    first: Mapping[Any, torch.Tensor], second: Mapping[Any, torch.Tensor]
) -> float:
    if first.keys() != second.keys() or any(
        type(value) is not torch.Tensor for value in second.values()
    ):
        raise ValueError("The checkpoints hold other tensors.")
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def _momentum(checkpoint: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    return {
        number: values["momentum_buffer"]
        for number, values in checkpoint["optimizer_state"]["state"].items()
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
