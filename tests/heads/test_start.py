"""Heads of every network fitted to synthetic cases with two channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stunet_plugin.heads import patches
from stunet_plugin.heads.by_name import Outputs
from stunet_plugin.heads.regression import Samples
from stunet_plugin.heads.start import Heads

from network_helpers import NETWORKS, build

LABELS = {"background": 0, "bright": 1, "dark": 2}
FITTED = ("STUNet", "STUNet thick", "STUNet 2D", "PCTNet 1", "FMUNet 0", "FMUNet 1")


def cases(shape: tuple[int, ...], ignore: int = 0) -> Any:
    """Return a dataset of five cases: two boxes that both channels show."""
    random = np.random.default_rng(0)

    def load_case(name: str) -> tuple[Any, ...]:
        image = random.normal(0, 0.1, (2, *shape)).astype(np.float32)
        labels = np.zeros((1, *shape), np.int8)
        for label, half in ((1, 0), (2, 1)):
            box = tuple(slice(size // 8, size - size // 8) for size in shape[:2])
            middle = slice(shape[2] // 2 * half + 2, shape[2] // 2 * (half + 1) - 2)
            labels[(0, *box, middle)] = label
        image[0] += 3.0 * (labels[0] == 1)
        image[1] -= 3.0 * (labels[0] == 2)
        labels[0, :, 0] = ignore or -1
        return image, labels, None, {}

    return SimpleNamespace(identifiers=[f"case{x}" for x in range(5)], load_case=load_case)


def losses(network: torch.nn.Module, dataset: Any, outputs: Outputs) -> tuple[float, float]:
    """Return the cross-entropy of a case at full resolution, and that of the best constant."""
    image, segmentation, *_ = dataset.load_case("case0")
    x, labels = torch.from_numpy(image)[None], np.maximum(segmentation[0], 0)
    if next(network.parameters()).ndim == 4:
        x, labels = x[:, :, 2], labels[2]
    known = labels <= 2
    with torch.no_grad():
        logits = network.eval()(x)[0][0].flatten(1).T[known.ravel()]
    targets = np.stack([np.isin(labels[known], values) for values in outputs.values], 1)
    wanted = torch.from_numpy(targets).float()
    samples = Samples(logits, wanted, torch.ones(len(wanted)), wanted[:, 0], outputs.regions)
    share = wanted.mean(0).clamp(min=1e-6)
    constant = torch.logit(share) if outputs.regions else share.log()
    return float(samples.loss(logits)), float(samples.loss(constant.expand_as(logits)))


def fitted(name: str, outputs: Outputs, **how: Any) -> tuple[Any, Any, Heads]:
    network = build(name, input_channels=2, num_classes=len(outputs.names)).train()
    return (network, *fit_heads(network, name, outputs, **how))


def fit_heads(network: Any, name: str, outputs: Outputs, **how: Any) -> tuple[Any, Heads]:
    patch = NETWORKS[name][1]
    shape = (5, *patch) if len(patch) == 2 else patch
    found = cases(shape, **how)
    tensors = {x: y.clone() for x, y in network.state_dict().items() if ".seg_layers." in x}
    heads = Heads(network, tensors)
    labels = sorted({0, *(value for values in outputs.values for value in values)})
    heads.fit(outputs, lambda: patches.training_patches(found, patch, labels, 1), patch, 1)
    return found, heads


@pytest.fixture(autouse=True)
def _few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PATCHES", 6)


@pytest.mark.parametrize("name", FITTED)
def test_fitted_heads_of_every_network_know_more_than_how_common_classes_are(name: str) -> None:
    outputs = Outputs.of({"labels": LABELS}, "test")
    network, dataset, heads = fitted(name, outputs)
    assert network.training
    loss, constant = losses(network, dataset, outputs)
    assert loss < 0.9 * constant
    assert "by fit: background, bright, dark (6 patches of 5 cases" in heads.lines[0]


def test_regions_and_voxels_to_ignore() -> None:
    labels = {"background": 0, "both": [1, 2], "dark": [2], "ignore": 3}
    outputs = Outputs.of({"labels": labels, "regions_class_order": [1, 2]}, "test")
    network, found, _ = fitted("STUNet", outputs, ignore=3)
    loss, constant = losses(network, found, outputs)
    assert loss < 0.9 * constant


def test_a_class_without_voxels_stays_random_and_is_outvoted() -> None:
    outputs = Outputs.of({"labels": {**LABELS, "nowhere": 3}}, "test")
    network, dataset, heads = fitted("STUNet", outputs)
    before = build("STUNet", input_channels=2, num_classes=4).state_dict()
    for name, tensor in heads.tensors.items():
        assert torch.equal(tensor[3], before[name][3])
        assert not torch.equal(tensor[1], before[name][1])
    assert any("at random: nowhere (no voxel in" in line for line in heads.lines)
    loss, constant = losses(network, dataset, outputs)
    assert loss < constant


def test_features_that_are_not_finite_leave_heads_at_random() -> None:
    network = build("STUNet", input_channels=2)
    torch.nn.init.constant_(network.encoder.stages[0][0].conv1.bias, torch.nan)
    heads = fit_heads(network, "STUNet", Outputs.of({"labels": LABELS}, "test"))[1]
    assert heads.lines == ["Segmentation heads at random: features are not finite numbers."]
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in heads.tensors.items())


def test_patches_are_around_all_classes_and_the_same_again() -> None:
    dataset = cases((40, 24, 32))
    first, again = (
        list(patches.training_patches(dataset, (16, 16, 16), [0, 1, 2], 3)) for _ in range(2)
    )
    assert [one.name for one in first] == [one.name for one in again]
    assert all(np.array_equal(x.labels, y.labels) for x, y in zip(first, again, strict=True))
    assert {one.case for one in first} == {0, 1, 2, 3, 4}
    assert all(tuple(one.image.shape) == (2, 16, 16, 16) for one in first)
    assert {int(x) for one in first for x in np.unique(one.labels)} == {0, 1, 2}
    # Another class, which no case has, is looked for once in all cases.
    more = list(patches.training_patches(dataset, (16, 16, 16), [0, 1, 2, 9], 3))
    assert len(more) == 6
