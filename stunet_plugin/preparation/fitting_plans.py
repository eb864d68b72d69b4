"""Plans that pretrained weights fit: the user's, nnU-Net's, those of the network's planner, or
plans like the pretraining's; made with stock commands where they are not there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION, PLANS_NAME
from stunet_plugin.trainers import TRAINERS
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights import pretrained
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import NetworkWeights, Origin
from stunet_plugin.weights.locate import SHARED, Source
from stunet_plugin.weights.trained_options import USE_ITS_TRAINER, refuse_options

TO_IMPORT = (Origin.V1, Origin.V2_PORT, Origin.PCTNET, Origin.FMUNET)
"""Formats that nnU-Net's loader does not take."""


class Preparation:
    """A dataset in nnUNet_preprocessed, and the stock commands that prepare it.

    Args:
        dataset: with an ID in its name.
        folder: of the dataset in nnUNet_preprocessed.
        stock: runs a stock command given as words and more words.
        processes: for planning and preprocessing.
    """

    def __init__(
        self, dataset: RawDataset, folder: Path, stock: Callable[..., None], processes: int
    ) -> None:
        self.dataset, self.folder, self.stock = dataset, folder, stock
        self.count = f"-np {processes}"
        self.number = str(int(dataset.name[len("Dataset") :][:3]))
        self.made: set[str] = set()
        """Plans that were made here, which nothing is preprocessed with yet."""

    def choose_plans(self, source: Source, weights: NetworkWeights, wanted: str | None) -> str:
        """Return the name of plans that weights fit, made if need be; raise PluginError if there
        are none, or the wanted ones do not fit."""
        if wanted:
            if not self._is_there(wanted):
                file = self.folder / f"{wanted}.json"
                raise PluginError(f"-p {wanted}: there is no {file}. Plan it first.")
            if reason := self._misfit(wanted, source, weights):
                raise PluginError(f"-p {wanted} does not fit the weights: {reason}.")
            return wanted
        self._make_default()
        reasons, network = [self._misfit(PLANS_NAME, source, weights)], weights.misfm
        if not reasons[0]:
            return PLANS_NAME
        ways = dict[str, list[str]]()
        if network:
            words = f"stunet plan -d {self.number} -pl {network.planner} {self.count}"
            ways[network.plans] = words.split()
        if find_plan(source, weights):
            ways[weights.plans_like] = ["stunet", "plan-like", str(source.checkpoint)]
            ways[weights.plans_like] += ["-d", self.number]
        for plans, command in ways.items():
            if not self._is_there(plans):
                self.stock(*command)
                self.made.add(plans)
            misfit = self._misfit(plans, source, weights)
            reasons.append(misfit or self._unlike(plans, source, weights))
            if not reasons[-1]:
                return plans
        tried = " ".join(f"{x}: {y}." for x, y in zip((PLANS_NAME, *ways), reasons, strict=True))
        raise PluginError(
            f"No plans of {self.dataset.name} fit {weights.title}. {tried} Make plans with this"
            " network and name them with -p."
        )

    def _make_default(self) -> None:
        if not self._is_there(PLANS_NAME):
            self.extract_fingerprint()
            self.stock(f"nnUNetv2_plan_experiment -d {self.number}")
            self.made.add(PLANS_NAME)

    def extract_fingerprint(self) -> None:
        """Extract the fingerprint, which planners and trainers want, unless that is done."""
        if not (self.folder / "dataset_fingerprint.json").is_file():
            self.stock(f"nnUNetv2_extract_fingerprint -d {self.number} {self.count}")

    def preprocess(self, plans: str, cases: Collection[str]) -> None:
        """Preprocess with plans, unless that is done for these cases."""
        identifier = self.configuration(plans).data_identifier
        there = {x.stem for x in (self.folder / identifier).glob("*.pkl")}
        if plans in self.made or not there.issuperset(cases):
            where = f"-plans_name {plans} -c {CONFIGURATION} {self.count}"
            self.stock(f"nnUNetv2_preprocess -d {self.number} {where}")
            self.made.discard(plans)

    def manager(self, plans: str) -> PlansManager:
        return PlansManager(read_json(self.folder / f"{plans}.json"))

    def configuration(self, plans: str) -> ConfigurationManager:
        return self.manager(plans).get_configuration(CONFIGURATION)

    def _is_there(self, plans: str) -> bool:
        return (self.folder / f"{plans}.json").is_file()

    def _misfit(self, plans: str, source: Source, weights: NetworkWeights) -> str:
        """Return why weights do not fit the network that their trainer builds for plans, "" if they
        do."""
        manager = self.manager(plans)
        if CONFIGURATION not in manager.available_configurations:
            return f"there is no {CONFIGURATION}"
        trainer: Any = TRAINERS[f"{weights.trainer}_ft"]
        given = manager, self.configuration(plans), len(self.dataset.channels), 1
        try:
            with torch.device("meta"):
                network = trainer.build_network_architecture(*given)
        except PluginError as error:
            return str(error).rstrip(".")
        tensors = pretrained.read_for(str(source.checkpoint), network).checkpoint["network_weights"]
        return pretrained.describe_mismatches(network, tensors, heads_too=False)

    def _unlike(self, plans: str, source: Source, weights: NetworkWeights) -> str:
        """Return why plans of this name are not those like the pretraining, "" if they are."""
        model = find_plan(source, weights)
        if model is None or plans != weights.plans_like:
            return ""
        chosen = self.configuration(plans)
        if (tuple(chosen.spacing), tuple(chosen.patch_size)) == (model.spacing, model.patch_size):
            return ""
        return (
            "they are like another pretraining (spacing or patch size differs). Make others: stunet"
            f" plan-like {shlex.quote(str(source.checkpoint))} -d {self.number} --name NAME"
        )


def check_weights(weights: NetworkWeights, source: Source, dataset: RawDataset) -> None:
    """Raise PluginError unless nnU-Net's loader takes a file, for images of so many channels, and
    the plans made here would lose nothing of its network."""
    refuse_options(weights.checkpoint, source.checkpoint, USE_ITS_TRAINER)
    file, channels = shlex.quote(str(source.checkpoint)), len(dataset.channels)
    shared = source.checkpoint.name == SHARED
    if shared or weights.origin in TO_IMPORT:
        what = "shared model, which nnU-Net does not read" if shared else weights.origin.value
        raise PluginError(
            f"{source.checkpoint} is a {what}. Run: stunet import {file} --out"
            " FOLDER    # then fine-tune FOLDER"
        )
    if channels != weights.input_channels:
        raise PluginError(
            f"The weights take {weights.input_channels} image channel(s), {dataset.name} has"
            f" {channels}. Run: stunet import {file} --in-channels {channels} --out FOLDER    #"
            " then fine-tune FOLDER"
        )
