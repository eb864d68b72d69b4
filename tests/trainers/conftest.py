"""Fixture of the trainers' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Workspace
from trainer_helpers import DATASET, Make, build, small_plans


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
        workspace: Workspace = nnunet_environment,
        dataset: dict[str, Any] = DATASET,
        options: dict[str, object] | None = None,
        dataset_id: str = "901",
        **changes: Any,
    ) -> Any:
        for variable, value in (options or {}).items():
            monkeypatch.setenv(variable, str(value))
        plans = small_plans(workspace.plans(dataset_id=dataset_id), name)
        chosen = plans["configurations"].get(configuration, {})
        strides = changes.pop("strides", None)
        chosen.update(changes)
        if strides:
            chosen["architecture"]["arch_kwargs"]["strides"] = strides
        return build(name, plans, configuration, fold, dataset)

    return make
