"""SPM: the published function, its start as the identity, precision, sizes, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.shape_priors import BATCH, PUBLISHED, SPM, ShapePriorBlock, ShapePriors

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


def translate(key: str) -> str:
    for pattern, ours in NAMES.items():
        key = re.sub(pattern, ours, key)
    return key


def published(shared: Path, name: str) -> tuple[ShapePriorBlock, dict[str, Tensor]]:
    """A block with a fixture's weights, and what is recorded of it; one of a flat volume in 2D."""
    grid, heads, hidden, classes, channels, scale, axes = BLOCKS[name]
    option = SPM((1,), grid, heads, hidden, 0.1, BATCH, PUBLISHED, False, True, False)
    shape = [cells * step for cells, step in zip(grid, scale, strict=True)]
    conv = nn.Conv3d if axes == 3 else nn.Conv2d
    block = ShapePriorBlock(option, channels, shape, classes, conv, last=False)
    folder, weights = shared / "fixtures" / "network_options", {}
    for key, value in torch.load(folder / f"spm_block_{name}.pt").items():
        key = translate(key)
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


class PublishedNetwork:
    """The published network for BraTS around our priors, in evaluation mode; the weights by the
    rule of the fixtures, as they are too large for a file."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        self.weights = {
            key: self._draw(key, shape) for key, (shape, kind) in shapes.items() if "float" in kind
        }
        option = SPM((1, 2, 3), (2, 2, 2), 8, 768, 0.1, BATCH, PUBLISHED, False, True, False)
        sizes = [(64, (16,) * 3), (256, (8,) * 3), (512, (4,) * 3)]
        self.priors = ShapePriors(option, sizes, 3, nn.Conv3d).eval()
        ours = {"start": self.weights["learnable_shape_prior"]}
        for key, value in self.weights.items():
            if found := re.fullmatch(r"spm(\d)\.(.*)", key):
                ours[f"blocks.{int(found[1]) - 1}.{translate(found[2])}"] = value
        missing, unexpected = self.priors.load_state_dict(ours, strict=False)
        assert all(key.endswith("num_batches_tracked") for key in missing)
        # What nothing reads: the last refined prior.
        assert all(key.startswith("blocks.2.refine.") for key in unexpected)

    @staticmethod
    def _draw(key: str, shape: list[int]) -> Tensor:
        random = np.random.RandomState((crc32(key.encode()) ^ 77) % 2**32)
        z = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        last = key.rpartition(".")[2]
        if last in ("running_var", "running_mean"):
            return 0.5 + z.abs() if last == "running_var" else 0.2 * z
        if len(shape) == 1:
            return 1 + 0.2 * z if last == "weight" else 0.1 * z
        return z / z[0].numel() ** 0.5 if last == "weight" else z

    def _conv(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{key}.weight"]
        if key.startswith("hybrid_model"):
            variance, mean = torch.var_mean(weight, (1, 2, 3, 4), correction=0, keepdim=True)
            weight = (weight - mean) / (variance + 1e-5).sqrt()
        padding = weight.shape[-1] // 2
        return functional.conv3d(x, weight, self.weights.get(f"{key}.bias"), stride, padding)

    def _group_norm(self, x: Tensor, key: str, groups: int = 32, eps: float = 1e-6) -> Tensor:
        affine = (self.weights[f"{key}.{name}"] for name in ("weight", "bias"))
        return functional.group_norm(x, groups, *affine, eps)

    def _pair(self, x: Tensor, key: str) -> Tensor:
        """conv - batch norm - ReLU, twice."""
        for part in (f"{key}.0", f"{key}.1"):
            names = ("running_mean", "running_var", "weight", "bias")
            norm = (self.weights[f"{part}.1.{name}"] for name in names)
            x = functional.batch_norm(self._conv(x, f"{part}.0"), *norm).relu()
        return x

    def _bottleneck(self, x: Tensor, key: str, stride: int) -> Tensor:
        y = self._group_norm(self._conv(x, f"{key}.conv1"), f"{key}.gn1").relu()
        y = self._group_norm(self._conv(y, f"{key}.conv2", stride), f"{key}.gn2").relu()
        y = self._group_norm(self._conv(y, f"{key}.conv3"), f"{key}.gn3")
        if f"{key}.downsample.weight" in self.weights:
            x = self._conv(x, f"{key}.downsample", stride)
            x = self._group_norm(x, f"{key}.gn_proj", x.shape[1], 1e-5)
        return (x + y).relu()

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        skips = [self._pair(x, "encoder1")]
        x = self._conv(skips[0], "hybrid_model.root.conv", 2)
        x = self._group_norm(x, "hybrid_model.root.gn").relu()
        skips.append(x)
        x = functional.max_pool3d(x, 3, 2, 1)
        for block, units in enumerate((2, 3, 5), 1):
            for unit in range(1, units + 1):
                stride = 2 if block > 1 == unit else 1
                x = self._bottleneck(x, f"hybrid_model.body.block{block}.unit{unit}", stride)
            skips.append(x)
        *skips, x = skips
        means = {f"feat{number}_mean": skip for number, skip in enumerate(skips[:0:-1])}
        means = {name: value.mean((2, 3, 4)) for name, value in means.items()}
        means["bottleneck_mean"] = x.mean((2, 3, 4))
        for number, skip in enumerate(self.priors(skips)[::-1], 1):
            x = functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
            x = self._pair(torch.cat((x, skip), 1), f"decoder{number}")
        return {**means, "out": self._conv(x, "segmentation_head")}


@pytest.mark.shared
def test_published_network(shared: Path) -> None:
    folder = shared / "fixtures" / "network_options"
    network = PublishedNetwork(json.loads((folder / "spm_net_brats32.keys.json").read_text()))
    with np.load(folder / "spm_net_brats32.npz") as file, torch.no_grad():
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        for key, found in network(arrays["x"]).items():
            # Of 8 voxels per channel, which the norms blow up: in float64 it differs as much.
            atol = 1e-4 if key == "bottleneck_mean" else 1e-5
            torch.testing.assert_close(found, arrays[key].view_as(found), rtol=0, atol=atol)


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
