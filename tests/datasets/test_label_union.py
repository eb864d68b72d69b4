"""Label mapping of datasets that are merged: what becomes ignore and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stunet_plugin.datasets.label_union import unite
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.label_systems import LabelSystem


def system(name: str, *classes: str, **more: Any) -> LabelSystem:
    return LabelSystem.from_table({"labels": list(classes), **more}, name)


def becomes(text: str) -> dict[str, str]:
    """What classes become, where not themselves: ``liver kidney=ignore``."""
    parts = (word.partition("=") for word in text.split())
    return {name: other or name for name, _, other in parts}


KIDNEYS = ["kidney_left", "kidney_right", "liver"]
APART, TOGETHER = system("A", *KIDNEYS), system("B", "kidney", "liver")
LOBES = system("A", "lobe_1", "lobe_2", groups={"lung": ["lobe_1", "lobe_2"]})
LUNG, LIVER = system("B", "lung"), system("B", "liver")
LIVER_SPLEEN, STOMACH_SPLEEN = system("A", "liver", "spleen"), system("B", "stomach", "spleen")
LEFT_KIDNEY = system("B", "kidney_left", "liver")


@pytest.mark.parametrize(
    ("systems", "classes", "absent", "first", "second"),
    [
        # The background of a dataset that lacks a class becomes ignore, unless it is not shown.
        ((LIVER_SPLEEN, LIVER), None, (), "liver spleen", "background=ignore liver"),
        ((LIVER_SPLEEN, LIVER), None, {"Spleen"}, "liver spleen", "liver"),
        # A larger class hides its parts, and the background does not.
        ((APART, TOGETHER), KIDNEYS, (), " ".join(KIDNEYS), "kidney=ignore liver"),
        # Half of a class is not the class: the other half is in the background.
        (
            *((TOGETHER, LEFT_KIDNEY), ["kidney", "liver"], ()),
            *("kidney liver", "background=ignore kidney_left=ignore liver"),
        ),
        # Classes that are left out are background where nothing can hide in them.
        (
            *((LIVER_SPLEEN, STOMACH_SPLEEN), ["spleen"], ()),
            *("liver=background spleen", "stomach=background spleen"),
        ),
        # Groups of one system are no classes of their own, but say what is a part of what.
        ((LOBES, LUNG), ["lung"], (), "lobe_1=lung lobe_2=lung", "lung"),
        ((LOBES, LUNG), ["lobe_1", "lobe_2"], (), "lobe_1 lobe_2", "lung=ignore"),
    ],
)
def test_what_classes_become(
    systems: Any, classes: Any, absent: Any, first: str, second: str
) -> None:
    joint, mappings = unite(systems, classes, [(), absent])
    found = [x.describe(one, joint) for one, x in zip(systems, mappings, strict=True)]
    assert found == [becomes(f"background {first}"), becomes(f"background {second}")]


def test_values() -> None:
    first, second = system("A", "liver", "Left Kidney"), LEFT_KIDNEY
    joint, (one, other) = unite([first, second], None, [(), ()])
    assert (joint.classes, joint.ignore) == ({"liver": (1,), "kidney_left": (2,)}, None)
    assert other.translate(np.array([0, 1, 2])).tolist() == [0, 2, 1]
    assert one.changes_nothing
    assert not other.changes_nothing
    # An ignore label stays one.
    ignoring = system("A", "liver", "ignore")
    joint, (mapping, _) = unite([ignoring, LIVER_SPLEEN], ["liver"], [(), ()])
    assert joint.ignore == 2
    assert mapping.translate(np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_refusals() -> None:
    with pytest.raises(PluginError, match="'kidney.*' and 'kidney.*' overlap in A"):
        unite([APART, TOGETHER], None, [(), ()])
    with pytest.raises(PluginError, match="No dataset has the class\\(es\\) heart"):
        unite([LIVER, LUNG], ["heart", "liver"], [(), ()])
