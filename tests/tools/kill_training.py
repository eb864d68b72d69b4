"""Kill trainings at random moments, also in the middle of a write, and see that each time a
checkpoint is there to go on from.

Each training is a process of its own that continues as ``nnUNetv2_train --c`` does, makes an epoch
of one step after another, and writes a checkpoint after each. SIGKILL hits it at a random moment,
half of the time while a checkpoint is being written. The next one says from which epoch it goes on.
Needs a preprocessed dataset of nnU-Net.

Exit codes: 0 every checkpoint loaded, 1 one did not, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.trainers.safe_trainer import UNFINISHED
from stunet_plugin.trainers.stunet_trainers import TRAINERS
from stunet_plugin.utils.files import write_atomically

PATCH = [16, 16, 16]
LONGEST_SECONDS = 2.0
"""Of training before a kill, once it has begun."""
PATIENCE_SECONDS = 300.0
"""For a training to begin, or a write."""


def train_until_killed(plans: dict[str, Any], folder: Path, pipe: int, size: str) -> None:
    """Continue from the checkpoint in a folder, tell its epoch, then make epochs of one step and
    checkpoints until killed."""
    os.environ["nnUNet_n_proc_DA"] = "0"
    plans["configurations"]["3d_fullres"].update(
        patch_size=PATCH,
        batch_size=2,
        architecture=stunet_architecture(get_preset(size), [[1, 1, 1], *[[2, 2, 2]] * 3]),
    )
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
    }
    plans["continue_training"] = True
    trainer = TRAINERS[f"STUNetTrainer_{size}"](
        plans, "3d_fullres", 0, description, torch.device("cpu")
    )
    trainer.output_folder = str(folder)
    trainer.initialize()
    maybe_load_checkpoint(trainer, True, False)
    trainer.set_deep_supervision_enabled(True)
    os.write(pipe, f"start {trainer.current_epoch}\n".encode())
    trainer.network.train()
    scales = trainer._get_deep_supervision_scales()
    shapes = [
        [max(round(extent * part), 1) for extent, part in zip(PATCH, scale, strict=True)]
        for scale in scales
    ]
    while True:
        data = torch.randn(2, 1, *PATCH)
        trainer.train_step(
            {
                "data": data,
                "target": [torch.randint(0, 3, (2, 1, *shape)).short() for shape in shapes],
            }
        )
        # nnU-Net writes the second now and then, when the validation is the best so far.
        trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
        trainer.current_epoch += 1
        os.write(pipe, f"saved {trainer.current_epoch}\n".encode())
        if random.random() < 0.3:
            trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))


def kill_once(
    plans: dict[str, Any], folder: Path, draws: random.Random, size: str
) -> dict[str, Any]:
    """Start a training, kill it, and return what it told: where it started, what it saved, and
    whether a write was cut short."""
    seconds, in_a_write = draws.random() * LONGEST_SECONDS, draws.random() < 0.5
    reading, writing = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            random.seed(seconds)
            train_until_killed(plans, folder, writing, size)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        first = told.readline()
        if first:
            time.sleep(seconds)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (
                in_a_write
                and not any(folder.glob(f"*{UNFINISHED}"))
                and time.monotonic() < deadline
            ):
                time.sleep(0.001)
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        lines = [first, *told]
    leftovers = list(folder.glob(f"*{UNFINISHED}"))
    for leftover in leftovers:
        leftover.unlink()
    start, saved = (
        [int(line.split()[1]) for line in lines if line.startswith(kind)]
        for kind in ("start", "saved")
    )
    return {"start": start[0] if start else None, "saved": saved, "cut_short": bool(leftovers)}


def kill_many(
    kills: int, plans: dict[str, Any], folder: Path, seed: int, size: str = "tiny"
) -> dict[str, int]:
    """Kill a number of trainings, each of which continues the one before, and count what came of
    it.

    Args:
        kills: how many.
        plans: of a preprocessed dataset, with a configuration 3d_fullres.
        folder: for the checkpoints.
        seed: of the moments.
        size: of STU-Net.
    """
    draws = random.Random(seed)
    counts = {
        "kills": 0,
        "in_a_write": 0,
        "checkpoints_saved": 0,
        "did_not_load": 0,
        "epochs_lost": 0,
        "epochs": 0,
    }
    reached = 0
    for _ in range(kills):
        told = kill_once(plans, folder, draws, size)
        counts["kills"] += 1
        counts["in_a_write"] += told["cut_short"]
        counts["checkpoints_saved"] += len(told["saved"])
        if told["start"] is None:
            counts["did_not_load"] += 1
            continue
        counts["epochs_lost"] += max(reached - told["start"], 0)
        reached = max([told["start"], *told["saved"]])
        counts["epochs"] = reached
        print(f"\r{counts}", end="", flush=True)
    print()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Example: python tests/tools/kill_training.py --plans"
            " $nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans.json --kills 300 --folder"
            " killed --json tests/tools/results/kill_training.json"
        ),
    )
    parser.add_argument(
        "--plans",
        type=Path,
        required=True,
        help="plans file of a preprocessed dataset, with 3d_fullres",
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints; new")
    parser.add_argument("--kills", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--size", default="tiny", help="of STU-Net (default: tiny)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--json", type=Path, required=True, help="file for the counts")
    options = parser.parse_args()
    if not options.plans.is_file():
        print(f"--plans {options.plans}: there is no such file.", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True)
    counts = kill_many(
        options.kills,
        json.loads(options.plans.read_text()),
        options.folder,
        options.seed,
        options.size,
    )
    versions = {"torch": torch.__version__, "nnunetv2": host_version()}
    report = {
        "date": datetime.now(timezone.utc).isoformat(),
        "versions": versions,
        "size": options.size,
        **counts,
    }
    write_atomically(options.json, json.dumps(report, indent=2))
    return 1 if counts["did_not_load"] or counts["epochs_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
