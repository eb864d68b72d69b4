"""Trainer that survives crashes: no half-written checkpoint, no NaN in the weights.

nnU-Net writes a checkpoint onto the one before it; and only its gradient scaler (on CUDA) skips
steps whose gradients are not finite.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.options import OPTIONS
from stunet_plugin.weights.pretrained import read_checkpoint

UNFINISHED = ".unfinished"
"""Ending of a checkpoint that is being written."""
FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
TO_RESUME_FROM = (LATEST, BEST)
"""What nnU-Net's ``--c`` takes while there is no final checkpoint, first choice first."""
MOST_SKIPPED_IN_A_ROW = 50
"""A training that skips so many steps in a row does not recover."""


class SafeTrainer(nnUNetTrainer):
    """nnU-Net's trainer with safe checkpoints and safe steps."""

    network: Any
    optimizer: Any
    _best_ema: Any
    _best_is_unwritten = False
    _loss_of_step: torch.Tensor | None = None
    _step_was_made = False
    _skipped = 0
    _skipped_in_a_row = 0

    def initialize(self) -> None:
        super().initialize()
        self.loss.register_forward_hook(self._note_loss)

    def any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. Every process has to call this."""
        if not self.is_ddp:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
        return bool(raised.item())

    def print_banner(self, text: str) -> None:
        """Print and log a warning that nobody overlooks."""
        self.print_to_log_file(f"\n{'!' * 100}\n{text}\n{'!' * 100}\n", add_timestamp=False)

    def run_training(self) -> None:
        """Train; Ctrl-C says how the training resumes."""
        try:
            super().run_training()
        except KeyboardInterrupt:
            found = self._checkpoints_to_resume_from()
            advice = f"with --c resumes from {found[0]}" if found else "starts again"
            text = f"Interrupted in epoch {self.current_epoch}. The same command {advice}."
            variables = [x.variable for x in OPTIONS if os.environ.get(x.variable)]
            text += f" Set again: {', '.join(variables)}." if variables else ""
            self.print_to_log_file(text)
            raise KeyboardInterrupt(text) from None

    def _checkpoints_to_resume_from(self) -> list[str]:
        return [name for name in TO_RESUME_FROM if Path(self.output_folder, name).is_file()]

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint under another name, and rename it once it is whole on the disk. If
        that fails, the earlier one is kept and training continues; the final one has to succeed."""
        if self.disable_checkpointing or self.local_rank != 0:
            super().save_checkpoint(filename)
            return
        target = Path(filename)
        try:
            # torch.save takes an open file too, and then says what is wrong with the disk.
            write_whole(target, super().save_checkpoint)
            return
        except OSError as caught:
            error = caught
        self._best_is_unwritten = target.name == BEST
        reason = os.strerror(error.errno) if error.errno else str(error)
        free = shutil.disk_usage(target.parent).free / 1e9
        text = f"Cannot write {target.name} to {target.parent} ({reason}; {free:.2f} GB free)."
        if target.name == FINAL:
            left = [x for x in (FINAL, *TO_RESUME_FROM) if (target.parent / x).is_file()]
            advice = f"run it with --c: it resumes from {left[0]}" if left else "retrain"
            raise PluginError(f"{text} The training is over. Make room and {advice}.") from error
        kept = f"The earlier {target.name} is kept. " if target.is_file() else ""
        self.print_banner(f"{text} {kept}Training continues; make room before the next checkpoint.")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob(f"*{UNFINISHED}"):
                self.print_to_log_file(f"Removing {leftover.name}, left by a killed training.")
                leftover.unlink(missing_ok=True)

    def on_epoch_end(self) -> None:
        best_before = self._best_ema
        self._best_is_unwritten = False
        super().on_epoch_end()
        if self.any_process(self._best_is_unwritten):
            # Otherwise only a still better epoch would be written.
            self._best_ema = best_before

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Resume from a checkpoint; the best score is that of ``checkpoint_best``, since nnU-Net
        writes ``checkpoint_latest`` before it compares the epoch with the best one."""
        super().load_checkpoint(filename_or_checkpoint)
        best = Path(self.output_folder, BEST)
        if best.is_file():
            with contextlib.suppress(PluginError):  # A damaged one is replaced by the next.
                self._best_ema = read_checkpoint(str(best), "The best checkpoint")["_best_ema"]

    def _note_loss(self, _: torch.nn.Module, __: Any, loss: torch.Tensor) -> None:
        self._loss_of_step = loss.detach()

    def _discard_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step: without gradients it changes nothing, not even momentum."""
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        to_check = [] if self._loss_of_step is None else [self._loss_of_step.float().sum()]
        if self.grad_scaler is None:
            # A scaler checks the gradients itself, and skips the step if one is infinite.
            gradients = [value.grad for value in parameters if value.grad is not None]
            to_check += [_local(norm).float() for norm in torch._foreach_norm(gradients)]
        finite = not to_check or bool(torch.stack(to_check).isfinite().all())
        # Each process has its own loss, and its own part of sharded gradients.
        self._step_was_made = not self.any_process(not finite)
        if not self._step_was_made:
            discard_gradients(parameters)

    def train_step(self, batch: dict) -> dict:
        self._loss_of_step = None
        self._step_was_made = False
        # A forward pass changes batch norm's running statistics, whatever comes of the step.
        buffers = list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        result: dict[str, Any] = super().train_step(batch)
        if self._step_was_made:
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
        # As many as before, because nnU-Net stacks those of all processes.
        losses[~finite] = losses[finite].mean() if finite.any() else np.nan
        super().on_train_epoch_end([{"loss": loss} for loss in losses])
        steps, scaler = len(losses), self.grad_scaler
        if self._skipped:
            text = f"Skipped {self._skipped} of {steps} steps: loss or gradients not finite."
            scale = f" The gradient scale is now {scaler.get_scale():g}." if scaler else ""
            self.print_to_log_file(text + scale)
        # A gradient scaler begins too high and skips a few of the first steps.
        limit = MOST_SKIPPED_IN_A_ROW if scaler else min(MOST_SKIPPED_IN_A_ROW, steps)
        if self.any_process(self._skipped_in_a_row >= limit):
            self._give_up()
        self._skipped = 0

    def _give_up(self) -> None:
        """End the training; its last good checkpoint stays."""
        # Saving takes all processes, so they have to decide alike.
        if not self.any_process(bool(self._checkpoints_to_resume_from())):
            # The weights are those of the last good step.
            self.save_checkpoint(str(Path(self.output_folder, LATEST)))
        found = self._checkpoints_to_resume_from()
        kept = f"{Path(self.output_folder, found[0])} is good. " if found else ""
        raise PluginError(
            f"Training stopped: loss or gradients of the last {self._skipped_in_a_row} steps are"
            f" not finite. {kept}Look for NaN or infinite values in the preprocessed images, or"
            " lower the learning rate; then run the same command with --c."
        )


def read_to_resume(file: str) -> dict[str, Any]:
    """Map the checkpoint that a training is to resume from into memory; the error for a damaged one
    names a whole one beside it."""
    try:
        return read_checkpoint(file, "The checkpoint to resume from,")
    except PluginError as error:
        name, advice = Path(file).name, "and there is no other. Start again without --c."
        # nnU-Net takes the first of these that is there.
        for other in reversed([x for x in TO_RESUME_FROM if x != name]):
            with contextlib.suppress(PluginError):
                read_checkpoint(str(Path(file).with_name(other)), "The checkpoint")
                advice = f"but {other} beside it is whole: move {name} away and repeat the command."
        reason = str(error.__cause__)[:200]
        raise PluginError(f"{file} is no checkpoint or damaged ({reason}), {advice}") from error


def discard_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Make an optimizer's step skip parameters: no update, no weight decay, no momentum. Unlike
    ``requires_grad = False`` this keeps the graph the same, so DDP and torch.compile work."""
    for parameter in parameters:
        parameter.grad = None


def _local(value: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has; all of it unless it is sharded."""
    return value.to_local() if hasattr(value, "to_local") else value


def write_whole(target: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name, flush it to the disk, then rename it; after an OSError
    ``target`` is as it was, and nothing else is left."""
    unfinished = target.with_name(target.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # torch says that it could not finish its archive; the reason is the error behind that.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise OSError(cause.errno, cause.strerror) from error
    # The rename too, so that a power cut does not undo it. Some file systems cannot do that.
    with contextlib.suppress(OSError):
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
