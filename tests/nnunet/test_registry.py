"""Registry: names that are nearly right get a hint, names of others do not."""

from __future__ import annotations

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.registry import Registry

PLANNERS = Registry(
    "planner", {"STUNetPlanner_small": 1, "STUNetPlanner_base": 2}, {"PCTPlanner": 3}
)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("STUnetPlanner_smal", "STUNetPlanner_small"),
        ("stunetplanner_base", "STUNetPlanner_base"),
        ("STUNet_Planner-base", "STUNetPlanner_base"),
        ("STUNetPlaner_small", "STUNetPlanner_small"),
        ("PctPlanner", "PCTPlanner"),
    ],
)
def test_hint(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AttributeError, match=typed):
        PLANNERS.module_getattr("plans")(typed)
    expected = f"Unknown planner '{typed}'. Did you mean {meant}? All names: stunet list --trainers"
    assert expected in capsys.readouterr().err
    with pytest.raises(PluginError, match=meant):
        PLANNERS.find(typed)


@pytest.mark.parametrize(
    "name", ["PCTPlanner", "nnUNetPlannerResEncL", "MySTUNetPlanner_small", "__path__"]
)
def test_no_hint(name: str) -> None:
    assert PLANNERS.hint(name) is None


def test_table() -> None:
    assert list(PLANNERS) == ["STUNetPlanner_small", "STUNetPlanner_base", "PCTPlanner"]
    assert PLANNERS.find("PCTPlanner") == 3
