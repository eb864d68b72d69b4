from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stunet_plugin import trainers

from conftest import Workspace
from trainer_helpers import DATASET, Make, small_plans


@pytest.fixture
def make(nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Make a small trainer on the phantoms, with changes to the plan's configuration; its results
    are below ``tmp_path``."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def make(
        name: str = "STUNetTrainer",
        configuration: str = "3d_fullres",
        fold: int | str = 0,
        plans: dict[str, Any] | None = None,
        dataset: dict[str, Any] = DATASET,
        options: dict[str, object] | None = None,
        **changes: Any,
    ) -> Any:
        for variable, value in (options or {}).items():
            monkeypatch.setenv(variable, str(value))
        plans = small_plans(plans or nnunet_environment.plans(), name)
        chosen = plans["configurations"].get(configuration, {})
        if strides := changes.pop("strides", None):
            chosen["architecture"]["arch_kwargs"]["strides"] = strides
        chosen.update(changes)
        device = torch.device("cpu")
        return trainers.TRAINERS[name](plans, configuration, fold, dataset, device)

    return make
