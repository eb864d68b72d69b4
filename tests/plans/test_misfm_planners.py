"""Planners of PCT-Net and FMUNet: patches that fit the mode, batches that fit the memory."""

from __future__ import annotations

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import fitting_patch, resolve
from stunet_plugin.networks.memory import GIGABYTE
from stunet_plugin.plans.misfm_planners import PLANNERS

from conftest import PHANTOM_ID, Workspace


def test_patch_that_fits_is_near_and_divisible() -> None:
    assert fitting_patch([1.0, 1.0, 1.0], [40, 56, 40])[0] == [48, 64, 48]
    assert fitting_patch([5.0, 1.0, 1.0], [18, 256, 250])[0] == [20, 256, 256]
    assert fitting_patch([1.0, 1.0, 1.0], [3, 3, 3])[0] == [32, 32, 32]


@pytest.mark.parametrize("name", PLANNERS)
def test_plans_fit_the_memory_target(nnunet_environment: Workspace, name: str) -> None:
    planner = PLANNERS[name](int(PHANTOM_ID), gpu_memory_target_in_gb=4)
    plans = planner.plan_experiment()
    assert "2d" not in plans["configurations"]
    chosen = plans["configurations"]["3d_fullres"]
    resolved, _ = resolve(chosen, planner.network_record, "a trainer")
    assert resolved == chosen["architecture"]
    needed = planner.training_bytes(resolved, chosen["patch_size"], chosen["batch_size"], 1, 6)
    assert needed <= 4 * GIGABYTE
    refused = f"{planner.network_name} does not fit into 1.5 GB.*Raise -gpu_memory_target"
    with pytest.raises(PluginError, match=refused):
        PLANNERS[name](int(PHANTOM_ID), gpu_memory_target_in_gb=1.5).plan_experiment()
    with pytest.raises(PluginError, match="belongs to plans of"):
        PLANNERS[name](int(PHANTOM_ID), plans_name="nnUNetPlans")
