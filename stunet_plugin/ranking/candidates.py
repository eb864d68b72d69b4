"""Candidates of a ranking: model folders, checkpoints, pretext checkpoints, random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from stunet_plugin.errors import PluginError
from stunet_plugin.inference.build_network import build_network, find_trainer
from stunet_plugin.networks.features import head_modules
from stunet_plugin.nnunet.names import CONFIGURATION
from stunet_plugin.ranking.options import check_configuration
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import NetworkWeights, is_decoder, read_weights
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.named import Named
from stunet_plugin.weights.pretrained import describe_mismatches
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.trained_options import refuse_options

HEADS, START = ".seg_layers.", "shape_priors.start"
"""Names that fine-tuning does not take over, nor do we."""
DECISIVE = ("patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", "architecture")
"""Entries of a configuration that decide what a network of given weights makes of an image."""


@dataclass(frozen=True)
class Plan:
    """How images are prepared and the network is built: plans of nnU-Net and one of their
    configurations."""

    plans: dict[str, Any] = field(repr=False)
    configuration: str

    @property
    def manager(self) -> PlansManager:
        return PlansManager(self.plans)

    @property
    def chosen(self) -> ConfigurationManager:
        return self.manager.get_configuration(self.configuration)

    @property
    def name(self) -> str:
        return f"{self.plans.get('plans_name', 'plans')}, {self.configuration}"

    def check(self, where: str) -> None:
        """Raise PluginError unless the configuration is there and takes images alone."""
        check_configuration(self.plans, self.configuration, where)
        first = self.chosen.previous_stage_name
        if first is not None:
            raise PluginError(
                f"{self.configuration} of {where} is the second stage of a cascade. Rank the first:"
                f" -c {first}"
            )


@dataclass(frozen=True)
class Candidate:
    """Weights in a file, or random ones (``file`` is None), of the network that a trainer builds
    for a plan."""

    name: str
    file: Path | None
    trainer: str
    plan: Plan
    translated: bool = False  # the file's tensors have other names than the network's

    def build(self, channels: int, seed: int) -> nn.Module:
        """Return the network, with heads at random and everything else as in the file, in
        evaluation mode; raise PluginError if the weights do not fit it."""
        weights = {} if self.file is None else self._weights(self.file)
        # Shape priors are maps of the outputs.
        outputs = weights[START].shape[1] if START in weights else 1
        network = self._initial(channels, seed, outputs)
        if self.file is not None:
            mismatches = describe_mismatches(network, weights, heads_too=False)
            if mismatches:
                raise PluginError(
                    f"{self.name}: the weights in {self.file} do not fit the network of"
                    f" {self.plan.name}: {mismatches}. Choose other plans (-p), or leave -p out."
                )
            kept = {name: value for name, value in weights.items() if HEADS not in name}
            network.load_state_dict(kept, strict=False)
        return network.eval()

    def _weights(self, file: Path) -> dict[str, torch.Tensor]:
        if self.translated:
            return read_weights(file).tensors
        weights: dict[str, torch.Tensor] = load_checkpoint(file)["network_weights"]
        return weights

    def _initial(self, channels: int, seed: int, outputs: int = 1) -> nn.Module:
        """Return the network with its initial weights, drawn with the seed."""
        manager, chosen = self.plan.manager, self.plan.chosen
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                # Heads are not looked at: one output takes the least memory.
                return build_network(self.trainer, manager, chosen, channels, outputs, True)
            except PluginError as error:
                raise PluginError(f"{self.name}: {error}") from error

    @cached_property
    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self._initial(1, 0)

    @cached_property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the network's weights: its architecture."""
        state = self._on_meta.state_dict()
        return tuple((name, tuple(value.shape)) for name, value in state.items())

    @cached_property
    def levels(self) -> int:
        """Segmentation heads, one per level of the decoder."""
        return len(head_modules(self._on_meta))


def find_candidates(given: Sequence[Named], target: Plan | None) -> list[Candidate]:
    """Return the candidates that a user names, with the target's plan or (None) their own; raise
    PluginError if a file is no checkpoint of nnU-Net v2, or has no plan."""
    found = []
    for one in given:
        if one.trainer and target is not None:
            found.append(Candidate(one.name, None, one.trainer, target))
        elif one.path:
            found.append(_of_file(one, target))
    for one in given:
        if not one.path and not one.trainer:
            found += _random_ones(found, one.name)
    return found


def _of_file(one: Named, target: Plan | None) -> Candidate:
    """Return the candidate in a checkpoint of nnU-Net v2 or nnssl."""
    checkpoint = load_checkpoint(one.file)
    weights = checkpoint.get("network_weights")
    if not isinstance(weights, Mapping):
        raise PluginError(
            f"{one.file} is no checkpoint of nnU-Net v2. Published weights become one with `stunet"
            " import`; `stunet inspect` says what a file is."
        )
    trainer = str(checkpoint.get("trainer_name"))
    names = [str(name) for name in weights]
    alone = any(x.startswith("encoder.") for x in names) and not any(map(is_decoder, names))
    if not nnssl.is_foreign(checkpoint) and _is_known(trainer):
        if alone:
            raise _encoder_only(one.file)
        if target is not None:
            refuse_options(checkpoint, one.file, "Rank it by its own plan: leave -p out.")
        plan = target or _own_plan(checkpoint, one.file)
        return Candidate(one.name, one.file, trainer, plan)
    # Of somebody else's trainer, which is of no matter where the network is known.
    network = read_weights(one.file)
    if network.encoder_only:
        raise _encoder_only(one.file)
    plan = target or _plan_of(network, checkpoint, one.file)
    return Candidate(one.name, one.file, network.trainer, plan, translated=True)


def _encoder_only(file: Path) -> PluginError:
    return PluginError(
        f"{file} is an encoder without a decoder, whose features are compared. Rank weights with a"
        " decoder; fine-tune with these and compare the results."
    )


def _is_known(trainer: str) -> bool:
    try:
        find_trainer(trainer)
    except PluginError:
        return False
    return True


def _plan_of(weights: NetworkWeights, checkpoint: Mapping[str, Any], file: Path) -> Plan:
    """Return the plan of nnU-Net in a checkpoint or beside it, or that of nnssl's adaptation plan
    in nnU-Net's terms."""
    if nnssl.is_foreign(checkpoint) and (plan := find_plan(Source(file), weights)):
        return Plan(plan.to_plans(weights, "Dataset000_Pretraining"), CONFIGURATION)
    return _own_plan(checkpoint, file)


def _own_plan(checkpoint: Mapping[str, Any], file: Path) -> Plan:
    """Return the plan of a model: ``plans.json`` of its folder, or what its checkpoint keeps."""
    arguments = checkpoint.get("init_args") or {}
    beside = file.parent.parent / "plans.json"
    plans = read_json(beside) if beside.is_file() else arguments.get("plans")
    if not isinstance(plans, dict) or not plans.get("configurations"):
        raise PluginError(f"{file} has no plan of its own. Give the dataset's plans: -p PLANS")
    plan = Plan(plans, str(arguments.get("configuration", "")))
    plan.check(str(file))
    return plan


def _random_ones(found: list[Candidate], name: str) -> list[Candidate]:
    """Return one candidate with random weights for each network and preparation of images."""
    different: dict[Any, Candidate] = {}
    for candidate in found:
        if candidate.file is not None:
            entries = [str(candidate.plan.chosen.configuration.get(entry)) for entry in DECISIVE]
            different.setdefault((*entries, *candidate.shapes), candidate)
    like = len(different) > 1
    return [
        replace(one, name=f"{name}, like {one.name}" if like else name, file=None)
        for one in different.values()
    ]
