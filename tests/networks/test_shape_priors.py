"""SPM: the published function, its start as the identity, precision, sizes, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.shape_priors import BATCH, PUBLISHED, SPM, ShapePriorBlock

from network_helpers import build, gradients, image

# Grid, heads, hidden size, classes, channels, scale, axes.
BLOCKS = {
    "iso": ((2, 3, 2), 4, 20, 3, 6, (2, 2, 2), 3),
    "scale4": ((2, 2, 1), 2, 16, 3, 5, (4, 4, 4), 3),
    "scale8": ((2, 2, 1), 2, 16, 3, 4, (8, 8, 8), 3),
    "aniso": ((2, 2, 3), 3, 24, 4, 5, (4, 8, 8), 3),
    "2d_as_3d": ((3, 2), 2, 10, 3, 5, (2, 2), 2),
}
NAMES = {
    r"SUB\.layer\.(\d)\.attention_norm": r"update.\1.norm1",
    r"SUB\.layer\.(\d)\.ffn_norm": r"update.\1.norm2",
    r"SUB\.layer\.(\d)\.ffn": r"update.\1",
    r"SUB\.layer\.(\d)\.attn\.position_embeddings": r"update.\1.class_bias",
    r"SUB\.layer\.(\d)\.attn": r"update.\1",
    r"SUB\.encoder_norm": "update.2",
    r"resblock1": "units.0",
    r"resblock2": "units.1",
    r"resblock3": "refine",
    r"conv3\.0": "shortcut",
    r"conv3\.1": "shortcut_norm",
    r"conv([12])\.0": r"conv\1",
    r"conv([12])\.1": r"norm\1",
}


def published(shared: Path, name: str) -> tuple[ShapePriorBlock, dict[str, Tensor]]:
    """A block with a fixture's weights, and what is recorded of it; one of a flat volume in 2D."""
    grid, heads, hidden, classes, channels, scale, axes = BLOCKS[name]
    option = SPM((1,), grid, heads, hidden, 0.1, BATCH, PUBLISHED, False, True, False)
    shape = [cells * step for cells, step in zip(grid, scale, strict=True)]
    conv = nn.Conv3d if axes == 3 else nn.Conv2d
    block = ShapePriorBlock(option, channels, shape, classes, conv, last=False)
    folder, weights = shared / "fixtures" / "network_options", {}
    for key, value in torch.load(folder / f"spm_block_{name}.pt").items():
        for pattern, ours in NAMES.items():
            key = re.sub(pattern, ours, key)
        weights[key] = value[..., value.shape[-1] // 2] if axes == 2 and value.ndim == 5 else value
    block.load_state_dict(weights)
    with np.load(folder / f"spm_block_{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    if axes == 2:
        arrays = {key: x.squeeze(-1) if x.ndim == 5 else x for key, x in arrays.items()}
    return block.eval(), arrays


@pytest.mark.shared
@pytest.mark.parametrize("name", BLOCKS)
def test_published_function(shared: Path, name: str) -> None:
    block, arrays = published(shared, name)
    feature, prior = (arrays[key].requires_grad_() for key in ("feature", "prior"))
    found = block(feature, prior)
    for value, key in zip(found, ("class_feature", "refined_prior"), strict=True):
        torch.testing.assert_close(value, arrays[key], rtol=0, atol=1e-5)
    if "sub_out" in arrays:
        torch.testing.assert_close(block.update(prior), arrays["sub_out"], rtol=0, atol=1e-5)
    if "grad_feature" in arrays:
        keys = ("w_class_feature", "w_refined_prior")
        sum((x * arrays[key]).sum() for x, key in zip(found, keys, strict=True)).backward()
        for value, key in ((feature, "grad_feature"), (prior, "grad_prior")):
            torch.testing.assert_close(value.grad, arrays[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["STUNet SPM", "STUNet 2D SPM"])
def test_starts_as_the_plain_network(name: str) -> None:
    network, plain = build(name).eval(), build(name.removesuffix(" SPM")).eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    x = image(name)
    assert all(map(torch.equal, network(x), plain(x)))
    # Gates are what learns first, from there on everything.
    gates = {key: x for key, x in gradients(network, x).items() if key.endswith(".gate")}
    assert all(grad.abs().max() > 0 for grad in gates.values())
    for gate in (block.gate for block in network.shape_priors.blocks):
        nn.init.constant_(gate, 0.5)
    found = gradients(network, x)
    priors = {key: grad for key, grad in found.items() if key.startswith("shape_priors")}
    assert all(grad.abs().max() > 0 for key, grad in priors.items()), priors.keys()


def test_checkpointing_and_the_control_without_a_prior() -> None:
    x, numbers = image("STUNet SPM"), {"dropout": 0, "hidden": 8, "gate": False}
    expected, found = (
        gradients(build("STUNet SPM", options={"spm": {**numbers, "checkpoint": on}}), x)
        for on in (False, True)
    )
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)
    control = build("STUNet SPM", options={"spm": {**numbers, "prior": False}})
    kept = gradients(control, x)
    assert set(kept) < set(expected)
    assert not any("update" in key or "start" in key for key in kept)


def test_affinities_do_not_overflow_and_are_not_saturated() -> None:
    """A channel that is 4 relu(a prior): 198,000 in the sum over 64^3 / 2^3 voxels."""
    torch.manual_seed(0)
    shape, tops = (32, 32, 32), {}
    for affinity in ("voxel", PUBLISHED):
        option = SPM((1,), (4, 4, 4), 8, 16, 0.0, "instance", affinity, True, True, False)
        block = ShapePriorBlock(option, 4, shape, 4, nn.Conv3d, last=False)
        maps = torch.randn(1, 4, *shape)
        features = 4 * maps.relu().to(torch.float16)
        assert (features[0, 0].float() * maps[0, 0]).sum() > 65_504
        assert block._cross_update(features, maps).isfinite().all()
        plain = torch.randn(1, 4, *shape)
        logits = plain.flatten(2) @ maps.flatten(2).transpose(1, 2) * block.scale
        tops[affinity] = float(logits.softmax(-1).amax(-1).mean())
    assert tops["voxel"] < 0.75 < 0.9 < tops[PUBLISHED]


def test_another_patch_size_is_refused() -> None:
    with pytest.raises(PluginError, match="belong to one patch size.*where the plan's patch has"):
        build("STUNet SPM").eval()(torch.randn(1, 1, 64, 64, 64))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"grid": [3, 2, 2], "stages": [2]}, r"grid must be divisors of stage 2, \[8, 8, 16\]"),
        ({"grid": [3, 3, 3]}, "no skip of .* fits a grid of"),
        ({"heads": 3}, "heads must be a divisor of the 16 cells"),
        ({"stages": [5]}, "stages must be rising whole numbers from 0 to 4"),
        ({"dropout": 1}, "dropout must be 0 or more, and below 1"),
        ({"affinity": "sqrt"}, "affinity must be one of voxel, published, not 'sqrt'"),
        ({"norm": "group"}, "norm must be one of instance, batch"),
        ({"classes": 3}, "has no setting 'classes'"),
    ],
)
def test_wrong_numbers_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        build("STUNet SPM", options={"spm": numbers})
