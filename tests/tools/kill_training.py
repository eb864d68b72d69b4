"""Trainings killed at random moments, also in the middle of a write, with a checkpoint left.

Each training is a process of its own that resumes as ``nnUNetv2_train --c`` does, makes an epoch of
one step after another, and writes a checkpoint after each. SIGKILL hits it at a random moment, half
of the time while a checkpoint is being written. Needs a preprocessed dataset of nnU-Net.

Exit codes: 0 every checkpoint loaded, 1 one did not, 2 wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.trainers.safe_trainer import UNFINISHED
from stunet_plugin.trainers.stunet_trainers import TRAINERS
from stunet_plugin.utils.files import write_atomically

PATCH = [16, 16, 16]
STRIDES = [[1, 1, 1], *[[2, 2, 2]] * 3]
LONGEST_SECONDS = 2.0
"""Of training before a kill, once it has begun."""
PATIENCE_SECONDS = 300.0
"""For a write to begin."""


def train_until_killed(plans: dict[str, Any], folder: Path, tell: Any, size: str) -> None:
    """Resume from a folder's checkpoint, tell its epoch, then train and save until killed."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    os.environ["nnUNet_n_proc_DA"] = "0"
    architecture = stunet_architecture(PRESETS[size], STRIDES)
    changes = {"patch_size": PATCH, "batch_size": 2, "architecture": architecture}
    plans["configurations"]["3d_fullres"].update(changes)
    plans["continue_training"] = True
    labels = {"background": 0, "a": 1, "b": 2}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    trainer_class = TRAINERS[f"STUNetTrainer_{size}"]
    trainer = trainer_class(plans, "3d_fullres", 0, description, torch.device("cpu"))
    trainer.output_folder = str(folder)
    trainer.initialize()
    maybe_load_checkpoint(trainer, True, False)
    trainer.set_deep_supervision_enabled(True)
    tell.send(trainer.current_epoch)
    trainer.network.train()
    scales = trainer._get_deep_supervision_scales()
    shapes = [np.maximum(np.multiply(PATCH, scale).round().astype(int), 1) for scale in scales]
    while True:
        targets = [torch.randint(0, 3, (2, 1, *shape)).short() for shape in shapes]
        trainer.train_step({"data": torch.randn(2, 1, *PATCH), "target": targets})
        trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
        trainer.current_epoch += 1
        tell.send(trainer.current_epoch)
        # nnU-Net writes it when the validation is the best so far.
        if random.random() < 0.3:
            trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))


def kill_once(
    plans: dict[str, Any], folder: Path, draws: random.Random, size: str
) -> tuple[list[int], bool]:
    """Start a training and kill it; return the epoch that it resumed at (none if it did not) and
    those that it saved, and whether a write was cut short."""
    seconds, in_a_write = draws.random() * LONGEST_SECONDS, draws.random() < 0.5
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=train_until_killed, args=(plans, folder, tell, size))
    random.seed(seconds)
    process.start()
    tell.close()
    epochs = []
    with told, contextlib.suppress(EOFError):
        epochs.append(told.recv())
        time.sleep(seconds)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while in_a_write and time.monotonic() < deadline:
            if any(folder.glob(f"*{UNFINISHED}")):
                break
            time.sleep(0.001)
        process.kill()
        while True:
            epochs.append(told.recv())
    process.join()
    leftovers = list(folder.glob(f"*{UNFINISHED}"))
    for leftover in leftovers:
        leftover.unlink()
    return epochs, bool(leftovers)


def kill_many(
    kills: int, plans: dict[str, Any], folder: Path, seed: int, size: str = "tiny"
) -> dict[str, int]:
    """Kill trainings, each of which resumes the one before; return counts of what came of it."""
    draws, reached = random.Random(seed), 0
    keys = ("kills", "in_a_write", "checkpoints_saved", "did_not_load", "epochs_lost", "epochs")
    counts = Counter(dict.fromkeys(keys, 0))
    for _ in range(kills):
        epochs, cut_short = kill_once(plans, folder, draws, size)
        counts.update(kills=1, in_a_write=cut_short, checkpoints_saved=len(epochs[1:]))
        if not epochs:
            counts["did_not_load"] += 1
            continue
        counts["epochs_lost"] += max(reached - epochs[0], 0)
        reached = counts["epochs"] = max(epochs)
        print(f"\r{dict(counts)}", end="", flush=True)
    print()
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plans", type=Path, required=True, help="plans file of a preprocessed dataset")
    add("--folder", type=Path, required=True, help="for the checkpoints; new")
    add("--kills", type=int, default=300, help="how many (300)")
    add("--size", default="tiny", help="of STU-Net (tiny)")
    add("--seed", type=int, default=1, help="of the moments (1)")
    add("--json", type=Path, required=True, help="file for the counts")
    options = parser.parse_args()
    if not options.plans.is_file():
        print(f"--plans {options.plans}: there is no such file.", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True)
    plans = json.loads(options.plans.read_text())
    counts = kill_many(options.kills, plans, options.folder, options.seed, options.size)
    about = {"date": datetime.now(timezone.utc).isoformat(), "size": options.size}
    about["versions"] = {"torch": torch.__version__, "nnunetv2": host_version()}
    write_atomically(options.json, json.dumps({**about, **counts}, indent=1))
    return 1 if counts["did_not_load"] or counts["epochs_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
