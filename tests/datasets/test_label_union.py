"""Label mapping of datasets that are merged: what becomes ignore and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stunet_plugin.datasets.label_systems import LabelSystem
from stunet_plugin.datasets.label_union import all_classes, joint_system, map_to_union
from stunet_plugin.errors import PluginError


def system(name: str, *classes: str, **more: Any) -> LabelSystem:
    labels = {"background": 0, **{one: value for value, one in enumerate(classes, 1)}}
    return LabelSystem.from_table({"labels": labels, **more}, name)


def mapped(
    *systems: LabelSystem,
    classes: list[str] | None = None,
    not_shown: dict[int, set[str]] | None = None,
) -> list[dict[str, str]]:
    """What the classes of each system become."""
    absent = [(not_shown or {}).get(number, set()) for number in range(len(systems))]
    joint = joint_system(systems, classes, absent)
    pairs = zip(systems, absent, strict=True)
    return [map_to_union(x, joint, names, systems).describe(x, joint) for x, names in pairs]


KIDNEYS = ["kidney_left", "kidney_right", "liver"]
APART, TOGETHER = system("A", *KIDNEYS), system("B", "kidney", "liver")
LOBES = system("A", "lobe_1", "lobe_2", groups={"lung": ["lobe_1", "lobe_2"]})
PLAIN = {"background": "background"}
OWN = {"liver": "liver", "spleen": "spleen"}


def test_same_classes_in_another_order_and_under_other_names() -> None:
    first, second = system("A", "liver", "Left Kidney"), system("B", "kidney_left", "liver")
    joint = joint_system([first, second], None, [(), ()])
    assert joint.classes == {"liver": (1,), "kidney_left": (2,)}
    assert joint.ignore is None
    mapping = map_to_union(second, joint, (), [first, second])
    assert mapping.translate(np.array([0, 1, 2])).tolist() == [0, 2, 1]
    assert map_to_union(first, joint, (), [first, second]).changes_nothing
    assert not mapping.changes_nothing


@pytest.mark.parametrize(
    ("systems", "options", "expected"),
    [
        # The background of a dataset that lacks a class becomes ignore, unless it is not shown.
        (
            (system("A", "liver", "spleen"), system("B", "liver")),
            {},
            [{**PLAIN, **OWN}, {"background": "ignore", "liver": "liver"}],
        ),
        (
            (system("A", "liver", "prostate"), system("B", "liver")),
            {"not_shown": {1: {"Prostate"}}},
            [None, {**PLAIN, "liver": "liver"}],
        ),
        # A larger class hides its parts, and the background does not.
        (
            (APART, TOGETHER),
            {"classes": KIDNEYS},
            [{**PLAIN, **{x: x for x in KIDNEYS}}, {**PLAIN, "kidney": "ignore", "liver": "liver"}],
        ),
        # The other way round both are the larger class.
        (
            (APART, TOGETHER),
            {"classes": ["kidney", "liver"]},
            [
                {**PLAIN, "kidney_left": "kidney", "kidney_right": "kidney", "liver": "liver"},
                {**PLAIN, "kidney": "kidney", "liver": "liver"},
            ],
        ),
        # Half of a class is not the class: the other half is in the background.
        (
            (TOGETHER, system("B", "kidney_left", "liver")),
            {"classes": ["kidney", "liver"]},
            [None, {"background": "ignore", "kidney_left": "ignore", "liver": "liver"}],
        ),
        # Classes that are left out are background where nothing can hide in them.
        (
            (system("A", "liver", "spleen"), system("B", "stomach", "spleen")),
            {"classes": ["spleen"]},
            [
                {**PLAIN, "liver": "background", "spleen": "spleen"},
                {**PLAIN, "stomach": "background", "spleen": "spleen"},
            ],
        ),
        (
            (system("A", "liver", "spleen"), system("B", "stomach", "spleen")),
            {"classes": ["spleen", "liver"]},
            [None, {"background": "ignore", "stomach": "ignore", "spleen": "spleen"}],
        ),
        # Groups of one system are no classes of their own, but say what is a part of what.
        (
            (LOBES, system("B", "lung")),
            {"classes": ["lung"]},
            [{**PLAIN, "lobe_1": "lung", "lobe_2": "lung"}, {**PLAIN, "lung": "lung"}],
        ),
        (
            (LOBES, system("B", "lung")),
            {"classes": ["lobe_1", "lobe_2"]},
            [None, {**PLAIN, "lung": "ignore"}],
        ),
    ],
)
def test_what_classes_become(systems: Any, options: Any, expected: list[Any]) -> None:
    for found, wanted in zip(mapped(*systems, **options), expected, strict=True):
        assert wanted is None or found == wanted
    assert all_classes([LOBES]) == ["lobe_1", "lobe_2"]


def test_an_ignore_label_stays_one() -> None:
    source = LabelSystem.from_table({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "A")
    systems = [source, system("B", "liver", "spleen")]
    joint = joint_system(systems, ["liver"], [(), ()])
    assert joint.ignore == 2
    mapping = map_to_union(source, joint, (), systems)
    assert mapping.translate(np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_refusals() -> None:
    with pytest.raises(PluginError, match="'kidney.*' and 'kidney.*' overlap in A"):
        mapped(APART, TOGETHER)
    with pytest.raises(PluginError, match="No dataset has the class\\(es\\) heart"):
        mapped(system("A", "liver"), system("B", "spleen"), classes=["heart", "liver"])
