"""Classes of a new dataset that a pretrained model has, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.heads.by_name import Outputs, Row, describe_rows, match, source_outputs
from stunet_plugin.utils.label_systems import load_label_system


def outputs(*names: str, **regions: list[int]) -> Outputs:
    """Return the outputs of labels 1, 2, ..., or of regions."""
    table: dict[str, Any] = {"background": 0, **{name: x for x, name in enumerate(names, 1)}}
    order = {"regions_class_order": [values[-1] for values in regions.values()]}
    return Outputs.of({"labels": {**table, **regions}, **(order if regions else {})}, "test")


KIDNEYS = "liver", "left kidney", "Kidney Right"
WHOLE, CORE = {"whole": [1, 2], "core": [2]}, {"core": [1], "rest": [2, 3]}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        # The same classes in another order and spelling: the background, too.
        (
            outputs(*KIDNEYS),
            outputs("kidney_right", "Liver", "kidney left"),
            {0: Row((0,)), 1: Row((3,)), 2: Row((1,)), 3: Row((2,))},
        ),
        # The background holds what the new dataset does not have: only a start.
        (
            outputs("liver", "spleen"),
            outputs("spleen", "lesion"),
            {0: Row((0,), exact=False), 1: Row((2,))},
        ),
        # A group is a start from the mean; all classes are covered.
        (
            outputs(*KIDNEYS),
            outputs("liver", "kidney"),
            {0: Row((0,)), 1: Row((1,)), 2: Row((2, 3), exact=False)},
        ),
        (outputs("kidney"), outputs("left kidney"), {}),
        # Numbers of an import without names mean nothing.
        (outputs("class_1"), outputs("class_1"), {}),
        (outputs(**WHOLE), outputs(core=[3], whole=[1, 3]), {0: Row((1,)), 1: Row((0,))}),
        # Between a softmax and sigmoids.
        (outputs("core", "b"), outputs(**CORE), {0: Row((1,), minus=0)}),
        (outputs(**WHOLE), outputs("core", "x"), {0: Row((), exact=False), 1: Row((1,))}),
    ],
)
def test_outputs_of_the_same_class(
    source: Outputs, target: Outputs, expected: dict[int, Row]
) -> None:
    assert match(source, target) == expected


def test_rows_and_what_the_log_says() -> None:
    source, target = outputs(*KIDNEYS), outputs("liver", "kidney")
    weights = torch.arange(4.0)[:, None]
    rows = match(source, target)
    assert [float(row.take(weights)) for row in rows.values()] == [0, 1, 2.5]
    assert float(Row((2,), minus=1).take(weights)) == 1
    assert float(Row(()).take(weights)) == 0
    text = "background, liver, kidney (mean of kidney_left and kidney_right)"
    assert describe_rows(rows, source, target) == text


def test_published_groups_and_ignored_voxels() -> None:
    published = load_label_system("STU-Net")
    names = ["background", *published.classes]
    source = Outputs.of({"labels": {name: x for x, name in enumerate(names)}}, "STU-Net")
    new = {"labels": {"background": 0, "kidney": 1, "spleen": 2, "ignore": 3}}
    rows = match(source, Outputs.of(new, "new"))
    assert [len(row.outputs) for row in rows.values()] == [1, 2, 1]
    assert [row.exact for row in rows.values()] == [False, False, True]


def test_where_names_come_from(tmp_path: Path) -> None:
    file, dataset = (
        str(tmp_path / "fold_0" / "checkpoint.pth"),
        {"labels": {"background": 0, "a": 1}},
    )
    assert source_outputs({}, file) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "b": 1}}))
    for checkpoint, name in (({}, "b"), ({"init_args": {"dataset_json": dataset}}, "a")):
        found = source_outputs(checkpoint, file)
        assert found is not None
        assert found.names == ("background", name)
    fused = {"init_args": {"dataset_json": {**dataset, "volume_fusion": {}}}}
    assert source_outputs(fused, file) is None
    (tmp_path / "dataset.json").write_text("[1]")
    with pytest.raises(PluginError, match="dataset.json holds a list"):
        source_outputs({}, file)


def test_a_class_that_stands_twice_is_refused() -> None:
    with pytest.raises(PluginError, match=r"'left_kidney' is 'kidney_left', which stands twice"):
        outputs("kidney left", "left_kidney")
