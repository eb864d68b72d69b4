"""Network options in plans: completed, recorded, composed, built by nnU-Net, refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import options_of, resolve, resolve_planned
from stunet_plugin.networks.network_options import OPTIONS
from stunet_plugin.networks.presets import PCTNET, PRESETS, UNETR_SIZES
from stunet_plugin.networks.stunet import STUNet

from network_helpers import gradients
from trainer_helpers import PATCH, RESIDUAL, misfm, stunet

SPACING = [1.0, 1.0, 1.0]


def configuration(architecture: dict[str, Any] = RESIDUAL, **changes: Any) -> dict[str, Any]:
    return {"architecture": architecture, "patch_size": PATCH, "spacing": SPACING, **changes}


def with_options(options: dict[str, Any], network: dict[str, Any] = RESIDUAL) -> dict[str, Any]:
    return resolve_planned(configuration(network), "a trainer", options).architecture


@pytest.mark.parametrize("option", OPTIONS)
def test_a_completed_plan_stays_as_it_is_and_nnunet_builds_it(option: str) -> None:
    recorded = json.loads(json.dumps(with_options({option: {}})))
    planned = configuration(recorded)
    assert list(options_of(planned)) == [option]
    for trainers_own in ({}, {option: {}}, {option: {"other": 1}}):
        found = resolve_planned(planned, "a trainer", trainers_own)
        assert found.architecture == recorded
    assert option.upper() in found.options[0]
    network = get_network_from_plans(*recorded.values(), 1, 3, deep_supervision=True)
    network.apply(network.initialize)
    gradients(network, torch.randn(2, 1, *PATCH))


def test_options_of_plan_and_trainer_add_up() -> None:
    planned = configuration(with_options({"spm": {"hidden": 8}}))
    found = resolve_planned(planned, "a trainer", {"grc": {}, "spm": {"hidden": 16}})
    options = found.architecture["arch_kwargs"]["options"]
    assert list(options) == ["grc", "spm"]
    assert options["spm"]["hidden"] == 8
    assert len(found.options) == 2
    network = get_network_from_plans(*found.architecture.values(), 1, 3, deep_supervision=True)
    gradients(network, torch.randn(2, 1, *PATCH))


def test_networks_without_stages_are_refused() -> None:
    unetr = UNETR_SIZES[0].architecture([[1] * 3, *[[2] * 3] * 4], PATCH)
    with pytest.raises(PluginError, match="for U-Nets with encoder.stages .*, not for UNETR"):
        resolve_planned(configuration(unetr), "a trainer", {"spm": {}})


@pytest.mark.parametrize("option", OPTIONS)
def test_every_family_takes_it(option: str) -> None:
    options = {option: {}}
    found = resolve(configuration(), PRESETS["small"], "a trainer", options).architecture
    with torch.device("meta"):
        assert isinstance(get_network_from_plans(*found.values(), 1, 3), STUNet)
    for network in ("PCTNet", "FMUNet"):
        entry = misfm(network)
        planned = configuration(entry, patch_size=[16, 64, 64])
        found = resolve_planned(planned, "a trainer", options).architecture
        with torch.device("meta"):
            built = get_network_from_plans(*found.values(), 1, 3, deep_supervision=True)
            if network == "FMUNet":  # the leaner of the two
                assert len(built(torch.empty(2, 1, 16, 64, 64))) == 4
        # The network's own trainer keeps what the plan has.
        if network == "PCTNet":
            kept = resolve({**planned, "architecture": found}, PCTNET, "PCTNetTrainer")
            assert kept.architecture["arch_kwargs"]["options"] == found["arch_kwargs"]["options"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"grcc": {}}}, "network option 'grcc'.*Did you mean grc"),
        ({"options": {"grc": 4}}, "grc is a int, not a table"),
        ({"options": {"grc": {"portion": "half"}}}, "portion must be a finite number, not 'half'"),
        ({"options": None}, "arch_kwargs lack network or options"),
        ({"network": {"arch_kwargs": {"strides": [[1, 1, 1]]}}}, "has no 'network_class_name'"),
        ({"network": {}}, "with its strides under arch_kwargs"),
    ],
)
def test_broken_entries_are_refused(changes: dict[str, Any], message: str) -> None:
    entry = with_options({"grc": {}})
    broken = {**entry, "arch_kwargs": {**entry["arch_kwargs"], **changes}}
    with pytest.raises(PluginError, match=message):
        resolve_planned(configuration(broken), "a trainer")


def test_a_plan_for_another_size_is_refused_with_options_too() -> None:
    planned = configuration(with_options({"grc": {}}, stunet()))
    with pytest.raises(PluginError, match="trains STU-Net small, but the plan is for"):
        resolve(planned, PRESETS["small"], "STUNetTrainer_small")
