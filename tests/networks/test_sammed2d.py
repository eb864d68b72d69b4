"""SAM-Med2D computes what the published network computed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from stunet_plugin.networks.presets import SAM_PRESETS
from stunet_plugin.weights.sam_keys import renamed

from sam_helpers import (
    ADAPTER,
    TINY,
    Adapter,
    Inputs,
    Prompts,
    SAMMed2D,
    fixtures,
    recorded_network,
)

CASES = ("point1", "points", "box", "mask", "points_mask", "points_box")
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}


def prompts_of(case: str, values: dict[str, torch.Tensor]) -> Prompts:
    given = {}
    if case == "point1":
        given = {"points": values["point1"], "labels": values["point1_label"]}
    if "points" in case:
        given = {"points": values["points"], "labels": values["point_labels"]}
    if "box" in case:
        given["boxes"] = values["box"]
    if "mask" in case:
        given["masks"] = values["mask"]
    return Prompts(**given)


@pytest.mark.shared
@torch.no_grad()
def test_adapter_is_the_published_one(shared: Path) -> None:
    weights, values = fixtures(shared, "sammed2d_adapter")
    adapter = Adapter(48)
    adapter.load_state_dict(weights)
    for name in ("", "_rect"):
        torch.testing.assert_close(adapter(values[f"x{name}"]), values[f"y{name}"], **TOLERANCE)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sammed2d_tiny_adapter", "sammed2d_tiny_noadapter"])
@torch.no_grad()
def test_masks_are_the_published_ones(name: str, shared: Path) -> None:
    values, network = fixtures(shared, name)[1], recorded_network(shared, name)
    for case in CASES:
        prompts = prompts_of(case, values)
        masks = network(Inputs(values["image"], None, prompts))
        torch.testing.assert_close(masks.embeddings, values["embedding"], **TOLERANCE)
        for several, logits, iou in (
            ("multi", masks.logits, masks.iou),
            ("single", *network.decode(masks.embeddings, prompts, several=False)),
        ):
            torch.testing.assert_close(logits, values[f"{case}_{several}_low"], **TOLERANCE)
            torch.testing.assert_close(iou, values[f"{case}_{several}_iou"], **TOLERANCE)
        size = {"size": (64, 64), "mode": "bilinear", "align_corners": False}
        chosen = torch.nn.functional.interpolate(masks.best()[0], **size)
        torch.testing.assert_close(chosen, values[f"{case}_chosen"], **TOLERANCE)


@pytest.mark.shared
def test_every_published_tensor_has_its_place(shared: Path) -> None:
    with torch.device("meta"):
        network, plain = (SAMMed2D(SAM_PRESETS["vit_b"], adapters) for adapters in (True, False))
    text = (shared / "fixtures/prompts/sammed2d_vit_b_256_keys.txt").read_text()
    pairs = [line.split("\t") for line in text.splitlines()]
    published = {x: torch.empty(ast.literal_eval(y), device="meta") for x, y in pairs}
    assert len(published) == 386
    for one in (network, plain):
        own = {name: value.shape for name, value in one.state_dict().items()}
        ours = renamed(published)
        kept = {x: y.shape for x, y in ours.items() if one is network or ADAPTER not in x}
        assert own == kept


@pytest.mark.parametrize("name", SAM_PRESETS)
def test_presets_count_their_parameters(name: str) -> None:
    preset = SAM_PRESETS[name]
    with torch.device("meta"):
        network = SAMMed2D(preset)
    trained = [(x, y.numel()) for x, y in network.named_parameters() if y.requires_grad]
    assert sum(count for _, count in trained) == preset.parameters
    assert sum(count for name, count in trained if ADAPTER in name) == preset.adapters


def test_every_parameter_gets_a_gradient_and_new_adapters_change_nothing() -> None:
    torch.manual_seed(0)
    network = SAMMed2D(TINY)
    plain = SAMMed2D(TINY, adapters=False)
    plain.load_state_dict(network.state_dict(), strict=False)
    images, corner = torch.randn(2, 3, 64, 64), torch.tensor([[5.0, 6.0]])
    points = torch.rand(4, 3, 2) * 64
    labels = torch.tensor([[1, 0, -1]]).expand(4, 3)
    boxes = torch.cat((corner, corner + 20), 1).expand(4, 4)
    prompts = Prompts(points, labels, boxes, torch.rand(4, 1, 16, 16))
    masks = network(Inputs(images, None, prompts))
    assert torch.equal(masks.logits, plain(Inputs(images, None, prompts)).logits)
    for layer in network.vision_encoder.layers:
        torch.nn.init.ones_(layer.mlp.adapter.norm.weight)
    again = network(Inputs(images, None, prompts))
    unmasked = network.decode(again.embeddings, Prompts(points, labels), several=False)
    everything = (again.logits, again.iou, *unmasked)
    sum(x.square().sum() for x in everything).backward()
    lacking = [x for x, y in network.named_parameters() if y.requires_grad and y.grad is None]
    assert not lacking


def test_objects_of_one_image_are_told_apart() -> None:
    network, images = SAMMed2D(TINY).eval(), torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[0, 0, 9, 9], [30, 30, 60, 60], [5, 9, 20, 22], [1, 2, 63, 60]]).float()
    with torch.no_grad():
        masks = network(Inputs(images, None, Prompts(boxes=boxes)))
        alone = network(Inputs(images[1:], None, Prompts(boxes=boxes[3:])))
    torch.testing.assert_close(masks.logits[3:], alone.logits, **TOLERANCE)
    logits, iou = masks.best()
    assert logits.shape == (4, 1, 16, 16)
    assert torch.equal(iou[:, 0], masks.iou.amax(1))
