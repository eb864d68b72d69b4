"""Fine-tuning of pretrained weights: the stock commands from a raw dataset to a trained model, but
for those whose work is done."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.datasets.raw_dataset import find_raw, read_raw
from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.commands import CommandFailedError, is_complete, run_command, what_is_left
from stunet_plugin.nnunet.names import CHECKPOINT, CONFIGURATION, PREPROCESSED, RAW, RESULTS
from stunet_plugin.nnunet.registration import missing_variables
from stunet_plugin.preparation.fitting_plans import Preparation, check_weights
from stunet_plugin.utils.device import choose_device
from stunet_plugin.weights.identify import read_weights
from stunet_plugin.weights.locate import find_model

if TYPE_CHECKING:
    from stunet_plugin.commands.fine_tune import FineTune


def fine_tune(options: FineTune) -> int:
    """Run what is left to do; return 1 if a command fails. A PluginError is for wrong input."""
    run = _FineTuning(options)
    try:
        run.all()
    except CommandFailedError as error:
        told = f"{error} The same command goes on from there."
        print(f"\nstunet fine-tune: {told}", file=sys.stderr)
        return 1
    return 0


class _FineTuning:
    """One model and one fold of one dataset."""

    def __init__(self, options: FineTune) -> None:
        if options.fold != "all" and not options.fold.isdigit():
            raise PluginError(f"-f must be a number or 'all', not {options.fold!r}.")
        if options.processes < 1:
            raise PluginError(f"-np must be at least 1, not {options.processes}.")
        for name in (PREPROCESSED, RESULTS):
            if not os.environ.get(name):
                raise PluginError(f"{name} is not set: {setting(name, f'/path/to/{name}')}")
        self.options, self.device = options, choose_device(options.device)
        self.dataset = read_raw(find_raw(options.dataset))
        self.source = find_model(options.model)
        self.weights = read_weights(self.source.checkpoint)
        self.trainer = f"{self.weights.trainer}_ft"
        check_weights(self.weights, self.source, self.dataset)
        if not re.match(r"Dataset\d{3}_", self.dataset.name):
            raise PluginError(f"-d must be the ID of a dataset in {RAW}, not {options.dataset}.")
        folder = Path(os.environ[PREPROCESSED], self.dataset.name)
        self.preparation = Preparation(self.dataset, folder, self._stock, options.processes)
        self.variables = missing_variables()

    def all(self) -> None:
        """Plan, preprocess and train, as far as that is not done."""
        for name in self.variables:
            # Makes the commands below work by hand.
            print(f"  $ {setting(name, '$(stunet path trainers)')}")
        plans = self.preparation.choose_plans(self.source, self.weights, self.options.plans)
        model = f"{self.trainer}__{plans}__{CONFIGURATION}"
        fold = Path(os.environ[RESULTS], self.dataset.name, model, f"fold_{self.options.fold}")
        file = self.source.checkpoint.absolute()
        logs = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in fold.glob("training_log_*.txt")
        ]
        if logs and not any(str(file) in text for text in logs):
            raise PluginError(
                f"{fold} is a training that did not start from {file}. Move it away, or name other"
                " plans with -p, whose trainings have a folder of their own."
            )
        if is_complete(fold):
            print(f"Trained already: {fold / CHECKPOINT}")
            return
        self.preparation.preprocess(plans, [case.name for case in self.dataset.cases])
        number = self.preparation.number
        words = f"nnUNetv2_train {number} {CONFIGURATION} {self.options.fold} -p {plans}"
        start = what_is_left(fold, file)
        self._stock(f"{words} -tr {self.trainer} -device {self.device}", *start)
        print(f"Trained:  {fold / CHECKPOINT}")

    def _stock(self, words: str, *more: str) -> None:
        """Print and run a command."""
        command = [*words.split(), *more]
        print(f"  $ {shlex.join(command)}", flush=True)
        run_command(command, {**os.environ, **self.variables})
