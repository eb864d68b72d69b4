"""Long runs survive: checkpoints that are never half-written, and steps that never carry a NaN into the weights.

nnU-Net writes a checkpoint onto the one before it, so a crash in the middle loses both; and only mixed precision on CUDA, through
its gradient scaler, leaves out steps whose gradients are not finite.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.errors import PluginError
from stunet_plugin.trainers.fine_tuning import discard_gradients

UNFINISHED = ".unfinished"
"""Ending of a checkpoint that is being written."""
FINAL = "checkpoint_final.pth"
TO_CONTINUE_FROM = ("checkpoint_latest.pth", "checkpoint_best.pth")
"""What nnU-Net's ``--c`` takes while there is no final checkpoint, first choice first."""
MOST_SKIPPED_IN_A_ROW = 50
"""A training that has not made a step for so long does not recover: its weights no longer change."""


class SafeTrainer(nnUNetTrainer):
    """nnU-Net's trainer with safe checkpoints and safe steps."""

    network: Any
    optimizer: Any

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device("cuda")
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._gradients_are_finite = True

    def agree(self, flag: bool) -> bool:
        """Return whether any process of this training says so."""
        return flag

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint beside the one that it replaces, and exchange them when it is on the disk as a whole.

        A checkpoint that cannot be written (disk full) leaves the earlier one as it is, and training goes on without.

        Raises:
            PluginError: it is the final one.
        """
        if self.disable_checkpointing or self.local_rank != 0:
            super().save_checkpoint(filename)
            return
        target = Path(filename)
        unfinished = target.with_name(target.name + UNFINISHED)
        try:
            super().save_checkpoint(str(unfinished))
            _flush(unfinished)
            os.replace(unfinished, target)
            _flush(target.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._report_unwritten(target, error)
        finally:
            unfinished.unlink(missing_ok=True)

    def _report_unwritten(self, target: Path, error: Exception) -> None:
        free = shutil.disk_usage(target.parent).free / 1e9
        reason = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)).splitlines()[0]
        text = f"{target.name} could not be written to {target.parent} ({reason}; {free:.2f} GB are free there)."
        left = [name for name in (target.name, *TO_CONTINUE_FROM) if (target.parent / name).is_file()]
        if target.name == FINAL:
            again = f"run the same command with --c: it goes on from {left[0]}" if left else "train again"
            advice = f"Make room and {again}."
            raise PluginError(f"{text} The training has ended all the same. {advice}") from error
        kept = f"The earlier {target.name} is as it was." if target.name in left else "There is none of that name yet."
        self.print_to_log_file(f"\n{'!' * 100}\n{text} {kept} Training goes on; make room before the next one.\n{'!' * 100}\n")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob(f"*{UNFINISHED}"):
                self.print_to_log_file(f"Removing {leftover.name}: a training was killed while it wrote that.")
                leftover.unlink(missing_ok=True)

    # --- steps ------------------------------------------------------------------------------------------------------------

    def guard_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer leave out the steps whose gradients are not finite."""
        if self.grad_scaler is None:
            # The scaler leaves such steps out itself, before the optimizer hears of them.
            optimizer.register_step_pre_hook(self._discard_gradients_unless_finite)

    def _discard_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without gradients the step changes nothing, momentum and weight decay included."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms = torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        finite = not norms or bool(torch.stack([_local(norm) for norm in norms]).isfinite().all())
        # Processes that share the network out see parts of the gradients.
        self._gradients_are_finite = not self.agree(not finite) if getattr(self, "sharded", False) else finite
        if not self._gradients_are_finite:
            discard_gradients(parameters)

    def train_step(self, batch: dict) -> dict:
        # Batch norm's running statistics take in a forward pass whatever comes of it.
        buffers = list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        self._gradients_are_finite = True
        result: dict[str, Any] = super().train_step(batch)
        if np.isfinite(result["loss"]).all() and self._gradients_are_finite:
            self._skipped_in_a_row = 0
            return result
        self._skipped += 1
        self._skipped_in_a_row += 1
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        losses = np.array([np.mean(output["loss"]) for output in train_outputs])
        finite = np.isfinite(losses)
        # As many as before, for nnU-Net stacks those of all processes, and with the mean of the others.
        mean = losses[finite].mean() if finite.any() else np.nan
        super().on_train_epoch_end([{"loss": loss if is_finite else mean} for loss, is_finite in zip(losses, finite, strict=True)])
        if self._skipped:
            self.print_to_log_file(
                f"{self._skipped} of {len(train_outputs)} steps had a loss or gradient that is not finite; none of it reached the "
                f"weights."
            )
        limit = min(MOST_SKIPPED_IN_A_ROW, len(train_outputs))
        if self.agree(self._skipped_in_a_row >= limit):
            self._give_up()
        self._skipped = 0

    def _give_up(self) -> None:
        """End the training; its last good checkpoint stays."""
        folder = Path(self.output_folder)
        # One answer of all processes, as saving is up to all of them.
        if not self.agree(any((folder / name).is_file() for name in TO_CONTINUE_FROM)):
            # The weights are those of the last good step.
            self.save_checkpoint(str(folder / TO_CONTINUE_FROM[0]))
        kept = next((name for name in TO_CONTINUE_FROM if (folder / name).is_file()), None)
        whole = f"{folder / kept} is from before and whole. " if kept else ""
        raise PluginError(
            f"The last {self._skipped_in_a_row} steps all had a loss or gradient that is not finite, so the training has stopped. "
            f"{whole}Look for NaN or infinite values in the preprocessed images (preprocess again), or lower the learning rate; "
            f"then run the same command with --c."
        )


def _local(value: torch.Tensor) -> torch.Tensor:
    """The part that this process has of a tensor that may be shared out."""
    part = getattr(value, "to_local", None)
    return value if part is None else part()


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk, so that a power cut does not undo what comes after."""
    # Some file systems cannot do that for folders.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
