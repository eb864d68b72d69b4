"""Long runs survive: checkpoints that are never half-written, and steps that never carry a NaN into
the weights.

nnU-Net writes a checkpoint onto the one before it, so a crash in the middle loses both; and only
mixed precision on CUDA, through its gradient scaler, leaves out steps whose gradients are not
finite.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet_plugin.errors import PluginError
from stunet_plugin.trainers.fine_tuning import discard_gradients
from stunet_plugin.weights.pretrained import read_checkpoint

UNFINISHED = ".unfinished"
"""Ending of a checkpoint that is being written."""
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
TO_CONTINUE_FROM = ("checkpoint_latest.pth", BEST)
"""What nnU-Net's ``--c`` takes while there is no final checkpoint, first choice first."""
MOST_SKIPPED_IN_A_ROW = 50
"""A training that has not made a step for so long does not recover: its weights no longer
change."""


class SafeTrainer(nnUNetTrainer):
    """nnU-Net's trainer with safe checkpoints and safe steps."""

    network: Any
    optimizer: Any
    _best_ema: Any
    _loss_of_step: torch.Tensor | None = None
    _best_is_unwritten = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._step_was_made = False

    def initialize(self) -> None:
        super().initialize()
        self.loss.register_forward_hook(self._note_loss)

    def agree(self, flag: bool) -> bool:
        """Return whether any process of this training says so."""
        return flag

    # --- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint beside the one that it replaces, and exchange them when it is on the
        disk as a whole.

        A checkpoint that cannot be written (disk full) leaves the earlier one as it is, and
        training goes on without.

        Raises:
            PluginError: it is the final one.
        """
        if self.disable_checkpointing or self.local_rank != 0:
            super().save_checkpoint(filename)
            return
        target = Path(filename)
        try:
            # torch.save, which nnU-Net hands its argument to, takes an open file too, and then says
            # what is wrong with the disk.
            _write_whole(target, super().save_checkpoint)
        except OSError as error:
            self._best_is_unwritten = target.name == BEST
            self._report_unwritten(target, error)

    def _report_unwritten(self, target: Path, error: OSError) -> None:
        free = shutil.disk_usage(target.parent).free / 1e9
        reason = os.strerror(error.errno) if error.errno else str(error)
        text = (
            f"{target.name} could not be written to {target.parent} ({reason}; {free:.2f} GB are"
            " free there)."
        )
        left = [
            name for name in (target.name, *TO_CONTINUE_FROM) if (target.parent / name).is_file()
        ]
        if target.name == FINAL:
            again = (
                f"run the same command with --c: it goes on from {left[0]}"
                if left
                else "train again"
            )
            advice = f"Make room and {again}."
            raise PluginError(f"{text} The training has ended all the same. {advice}") from error
        kept = (
            f"The earlier {target.name} is as it was."
            if target.name in left
            else "There is none of that name yet."
        )
        self.print_to_log_file(
            f"\n{'!' * 100}\n{text} {kept} Training goes on; make room before the next"
            f" one.\n{'!' * 100}\n"
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob(f"*{UNFINISHED}"):
                self.print_to_log_file(
                    f"Removing {leftover.name}: a training was killed while it wrote that."
                )
                leftover.unlink(missing_ok=True)

    def on_epoch_end(self) -> None:
        best_before = self._best_ema
        self._best_is_unwritten = False
        super().on_epoch_end()
        if self.agree(self._best_is_unwritten):
            # Otherwise only a still better epoch would be written.
            self._best_ema = best_before

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Go on from a checkpoint; ``checkpoint_best`` gives way to a better one alone.

        nnU-Net writes ``checkpoint_latest`` before it compares the epoch with the best one, so the
        best score in there may be an older one.
        """
        super().load_checkpoint(filename_or_checkpoint)
        best = Path(self.output_folder, BEST)
        if best.is_file():
            with contextlib.suppress(
                PluginError
            ):  # It is damaged; the next good epoch replaces it.
                self._best_ema = read_checkpoint(str(best), "The best checkpoint")["_best_ema"]

    # --- steps

    def guard_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer leave out the steps whose loss or gradients are not finite."""
        optimizer.register_step_pre_hook(self._discard_gradients_unless_finite)

    def _note_loss(self, _: torch.nn.Module, __: Any, loss: torch.Tensor) -> None:
        self._loss_of_step = loss.detach()

    def _discard_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without gradients the step changes nothing, momentum and weight decay included."""
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        to_check = [] if self._loss_of_step is None else [self._loss_of_step.float().sum()]
        if self.grad_scaler is None:
            # A scaler has looked at the gradients, and does not come here with infinite ones.
            norms = torch._foreach_norm(
                [parameter.grad for parameter in parameters if parameter.grad is not None]
            )
            to_check += [_local(norm).float() for norm in norms]
        finite = not to_check or bool(torch.stack(to_check).isfinite().all())
        # Processes have losses of their own, and parts of the gradients where they share the
        # network out.
        self._step_was_made = not self.agree(not finite)
        if not self._step_was_made:
            discard_gradients(parameters)

    def train_step(self, batch: dict) -> dict:
        # Batch norm's running statistics take in a forward pass whatever comes of it.
        buffers = list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        self._loss_of_step = None
        self._step_was_made = False
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
        # As many as before, for nnU-Net stacks those of all processes, and with the mean of the
        # others.
        mean = losses[finite].mean() if finite.any() else np.nan
        super().on_train_epoch_end(
            [
                {"loss": loss if is_finite else mean}
                for loss, is_finite in zip(losses, finite, strict=True)
            ]
        )
        if self._skipped:
            scale = (
                f" The gradient scale is {self.grad_scaler.get_scale():g} now."
                if self.grad_scaler is not None
                else ""
            )
            self.print_to_log_file(
                f"{self._skipped} of {len(train_outputs)} steps had a loss or gradient that is not"
                f" finite; none of it reached the weights.{scale}"
            )
        # A gradient scaler begins too high, and a few of the first steps are always left out until
        # it is low enough.
        limit = (
            MOST_SKIPPED_IN_A_ROW
            if self.grad_scaler is not None
            else min(MOST_SKIPPED_IN_A_ROW, len(train_outputs))
        )
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
            f"The last {self._skipped_in_a_row} steps all had a loss or gradient that is not"
            f" finite, so the training has stopped. {whole}Look for NaN or infinite values in the"
            " preprocessed images (preprocess again), or lower the learning rate; then run the"
            " same command with --c."
        )


def read_to_continue(file: str) -> dict[str, Any]:
    """Map the checkpoint that a training is to continue from into memory.

    Raises:
        PluginError: it is damaged; the message says which one beside it is whole.
    """
    try:
        return read_checkpoint(file, "The checkpoint to continue from,")
    except PluginError as error:
        path = Path(file)
        reason = f"{file} is no checkpoint or damaged ({str(error.__cause__)[:200]})"
        # nnU-Net takes the first of these that is there.
        for other in (path.with_name(name) for name in TO_CONTINUE_FROM if name != path.name):
            if _is_whole(other):
                raise PluginError(
                    f"{reason}, but {other.name} beside it is whole: move {path.name} away, and the"
                    " same command goes on from that."
                ) from error
        raise PluginError(
            f"{reason}, and there is no other to continue from. Without --c the training starts"
            " anew."
        ) from error


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_checkpoint(str(checkpoint), "The checkpoint")
    except PluginError:
        return False
    return True


def _local(value: torch.Tensor) -> torch.Tensor:
    """The part that this process has of a tensor that may be shared out."""
    part = getattr(value, "to_local", None)
    return value if part is None else part()


def _write_whole(target: Path, write: Callable[[Any], None]) -> None:
    """Write a file under another name, see that it is on the disk, then give it its name.

    Args:
        target: what is there stays until the new file is whole.
        write: writes to an open file.

    Raises:
        OSError: it could not be written; ``target`` is as it was, and nothing else is left.
    """
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
        behind = _os_error_behind(error)
        if behind is None or behind is error:
            raise
        raise OSError(behind.errno, behind.strerror) from error
    _flush_folder(target.parent)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch says that it could not finish its archive; why stands behind that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk, so that a power cut does not undo what comes
    after."""
    # Some file systems cannot do that.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
