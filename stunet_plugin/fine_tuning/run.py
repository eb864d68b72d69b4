"""Fine-tuning of pretrained weights: the stock commands from a raw dataset to a trained model, but
for those whose work is done."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.names import CONFIGURATION, PLANS_NAME, PREPROCESSED, RAW, RESULTS
from stunet_plugin.nnunet.registration import find_host, registered, trainers_folder
from stunet_plugin.trainers import TRAINERS
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights import pretrained
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import NetworkWeights, Origin, read_weights
from stunet_plugin.weights.locate import CHECKPOINTS, Source, find_model
from stunet_plugin.weights.trained_options import USE_ITS_TRAINER, refuse_options

if TYPE_CHECKING:
    from stunet_plugin.commands.fine_tune import FineTune

_TO_IMPORT = (Origin.V1, Origin.V2_PORT, Origin.PCTNET, Origin.FMUNET)
_EXTERNAL = "nnUNet_extTrainer"


class _CommandFailedError(Exception):
    """A stock command ended with an error, which it has printed."""


def fine_tune(options: FineTune) -> int:
    """Run what is left to do; return 1 if a command fails. A PluginError is for wrong input."""
    run = _FineTuning(options)
    try:
        run.all()
    except _CommandFailedError as error:
        print(f"\nstunet fine-tune: {error}", file=sys.stderr)
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
                raise PluginError(f"{name} is not set: export {name}=/path/to/{name}")
        self.options, self.device = options, choose_device(options.device)
        self.dataset = read_raw(find_raw(options.dataset))
        self.source = find_model(options.model)
        self.weights = read_weights(self.source.checkpoint)
        refuse_options(self.weights.checkpoint, self.source.checkpoint, USE_ITS_TRAINER)
        self.trainer = f"{self.weights.trainer}_ft"
        _check_weights(self.weights, self.source, self.dataset)
        if not re.match(r"Dataset\d{3}_", self.dataset.name):
            raise PluginError(f"-d must be the ID of a dataset in {RAW}, not {options.dataset}.")
        self.number = str(int(self.dataset.name[len("Dataset") :][:3]))
        self.folder = Path(os.environ[PREPROCESSED], self.dataset.name)
        known = os.environ.get(_EXTERNAL) or "registered" in registered(find_host()).values()
        self.planned = False  # by this run
        self.variables = {} if known else {_EXTERNAL: str(trainers_folder())}

    def all(self) -> None:
        """Plan, preprocess and train, as far as that is not done."""
        if self.variables:
            # Prints what makes the commands below work by hand.
            print(f"  $ export {_EXTERNAL}=$(stunet path trainers)")
        plans = self._choose_plans()
        model = f"{self.trainer}__{plans}__{CONFIGURATION}"
        fold = Path(os.environ[RESULTS], self.dataset.name, model, f"fold_{self.options.fold}")
        file = str(self.source.checkpoint.absolute())
        logs = [path.read_text(errors="replace") for path in fold.glob("training_log_*.txt")]
        if logs and not any(file in text for text in logs):
            raise PluginError(
                f"{fold} is a training that did not start from {file}. Move it away, or name other"
                " plans with -p, whose trainings have a folder of their own."
            )
        if (fold / CHECKPOINTS[0]).is_file():
            print(f"Trained already: {fold / CHECKPOINTS[0]}")
            return
        identifier = self._chosen(plans).data_identifier
        there = len(list((self.folder / identifier).glob("*.pkl")))
        if self.planned or there < len(self.dataset.cases):
            where = f"-plans_name {plans} -c {CONFIGURATION} -np {self.options.processes}"
            self._stock(f"nnUNetv2_preprocess -d {self.number} {where}")
        begun = any((fold / name).is_file() for name in CHECKPOINTS[1:])
        start = ("--c",) if begun else ("-pretrained_weights", file)
        words = f"nnUNetv2_train {self.number} {CONFIGURATION} {self.options.fold} -p {plans}"
        self._stock(f"{words} -tr {self.trainer} -device {self.device}", *start)
        print(f"Trained:  {fold / CHECKPOINTS[0]}")

    def _choose_plans(self) -> str:
        """Return the name of plans that the weights fit, made if need be: the user's, nnU-Net's,
        those of the network's planner, or plans like the pretraining's."""
        if self.options.plans:
            if not self._is_there(self.options.plans):
                file = self.folder / f"{self.options.plans}.json"
                raise PluginError(f"-p {self.options.plans}: there is no {file}. Plan it first.")
            if reason := self._misfit(self.options.plans):
                raise PluginError(f"-p {self.options.plans} does not fit the weights: {reason}.")
            return self.options.plans
        count = f"-np {self.options.processes}"
        if not self._is_there(PLANS_NAME):
            self._stock(f"nnUNetv2_extract_fingerprint -d {self.number} {count}")
            self._stock(f"nnUNetv2_plan_experiment -d {self.number}")
            self.planned = True
        reasons, network = [self._misfit(PLANS_NAME)], self.weights.misfm
        if not reasons[0]:
            return PLANS_NAME
        ways = dict[str, list[str]]()
        if network:
            words = f"stunet plan -d {self.number} -pl {network.planner} {count}"
            ways[network.plans] = words.split()
        if find_plan(self.source, self.weights):
            ways[self.weights.plans_like] = ["stunet", "plan-like", str(self.source.checkpoint)]
            ways[self.weights.plans_like] += ["-d", self.number]
        for plans, command in ways.items():
            if not self._is_there(plans):
                self._stock(*command)
                self.planned = True
            reasons.append(self._misfit(plans) or self._unlike(plans))
            if not reasons[-1]:
                return plans
        tried = " ".join(f"{x}: {y}." for x, y in zip((PLANS_NAME, *ways), reasons, strict=True))
        raise PluginError(
            f"No plans of {self.dataset.name} fit {self.weights.title}. {tried} Make plans with"
            " this network and name them with -p."
        )

    def _is_there(self, plans: str) -> bool:
        return (self.folder / f"{plans}.json").is_file()

    def _chosen(self, plans: str) -> Any:
        return PlansManager(read_json(self.folder / f"{plans}.json")).get_configuration(
            CONFIGURATION
        )

    def _misfit(self, plans: str) -> str:
        """Return why the weights do not fit the network that the trainer builds for plans, "" if
        they do."""
        manager = PlansManager(read_json(self.folder / f"{plans}.json"))
        if CONFIGURATION not in manager.available_configurations:
            return f"there is no {CONFIGURATION}"
        chosen, channels = manager.get_configuration(CONFIGURATION), len(self.dataset.channels)
        try:
            with torch.device("meta"):
                trainer = TRAINERS[self.trainer]
                network = trainer.build_network_architecture(manager, chosen, channels, 1)
        except PluginError as error:
            return str(error).rstrip(".")
        given = pretrained.read_for(str(self.source.checkpoint), network).checkpoint
        weights = given["network_weights"]
        return pretrained.describe_mismatches(network, weights, heads_too=False)

    def _unlike(self, plans: str) -> str:
        """Return why plans of this name are not those like the pretraining, "" if they are."""
        model = find_plan(self.source, self.weights)
        if model is None or plans != self.weights.plans_like:
            return ""
        chosen = self._chosen(plans)
        if (tuple(chosen.spacing), tuple(chosen.patch_size)) == (model.spacing, model.patch_size):
            return ""
        return (
            "they are like another pretraining (spacing or patch size differs). Make others: stunet"
            f" plan-like {shlex.quote(str(self.source.checkpoint))} -d {self.number} --name NAME"
        )

    def _stock(self, words: str, *more: str) -> None:
        """Print and run a command; Ctrl-C reaches it as well."""
        command = [*words.split(), *more]
        print(f"  $ {shlex.join(command)}", flush=True)
        environment = {**os.environ, **self.variables}
        if command[0] != "nnUNetv2_train" and environment.get("nnUNet_n_proc_DA") == "0":
            # Good for a training; nnU-Net's planners stop at it.
            environment["nnUNet_n_proc_DA"] = "1"
        process = subprocess.Popen(
            [find_command(command[0]), *command[1:]], env=environment, stdin=subprocess.DEVNULL
        )
        try:
            code = process.wait()
        except BaseException:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise
        if code != 0:
            told = f"{command[0]} ended with exit code {code}; what it says is above"
            raise _CommandFailedError(f"{told}. The same command goes on from there.")


def _check_weights(weights: NetworkWeights, source: Source, dataset: RawDataset) -> None:
    """Raise unless nnU-Net's loader takes a file, for images of so many channels."""
    file, channels = shlex.quote(str(source.checkpoint)), len(dataset.channels)
    if weights.origin in _TO_IMPORT:
        raise PluginError(
            f"{source.checkpoint} is a {weights.origin.value}. Run: stunet import {file} --out"
            " FOLDER    # then fine-tune FOLDER"
        )
    if channels != weights.input_channels:
        raise PluginError(
            f"The weights take {weights.input_channels} image channel(s), {dataset.name} has"
            f" {channels}. Run: stunet import {file} --in-channels {channels} --out FOLDER    #"
            " then fine-tune FOLDER"
        )
