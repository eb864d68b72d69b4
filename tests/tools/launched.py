"""Trainings started through torchrun, and the differences of what they leave behind."""

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
    """Start ``stunet_plugin.launch`` in processes, as if on several machines, and wait for them.

    Args:
        arguments: of the launcher.
        environment: of all processes.
        folder: working folder, where outputs go too.
        machines, processes: how many, and on each.
        limit: seconds after which what still runs is stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = str(uuid.uuid4())
    shape = f"--nnodes {machines} --nproc-per-node {processes}"
    meeting = f"--rdzv-backend c10d --rdzv-endpoint localhost:{_free_port()} --rdzv-id {group}"
    command = f"-m torch.distributed.run {shape} {meeting} -m stunet_plugin.launch"
    logs = [folder / f"{group}_{machine}.txt" for machine in range(machines)]
    start, started = time.monotonic(), []
    for log in logs:
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command.split(), *arguments],
                # What a killed process had in its buffers would be lost.
                env={**environment, "PYTHONUNBUFFERED": "1"},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        started.append(process)
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.0, start + limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            # torchrun ends its processes before itself.
            process.terminate()
            process.wait()
            codes.append(None)
    outputs = [log.read_text(errors="replace") for log in logs]
    return Launch(codes, outputs, time.monotonic() - start)


def write_plans(dataset: Path, name: str = PLANS, patch: Sequence[int] = PATCH) -> None:
    """Put plans with a small patch and a batch that four processes can split beside the others."""
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
        ValueError: they differ in epochs, names or shapes, or hold other than plain tensors.
    """
    found = {}
    for key in ("train_losses", "val_losses"):
        pairs = zip(first["logging"][key], second["logging"][key], strict=True)
        found[key] = float(max(abs(a - b) / abs(a) for a, b in pairs))
    weights = first["network_weights"], second["network_weights"]
    momentum = _momentum(first), _momentum(second)
    return {
        **found,
        "weights": _largest_difference(*weights),
        "momentum": _largest_difference(*momentum),
    }


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
