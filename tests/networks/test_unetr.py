"""UNETR with pruned tokens: the published function in both modes, sizes, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stunet_plugin.networks.from_plan import resolve
from stunet_plugin.networks.presets import UNETR_PRESETS
from stunet_plugin.networks.topology import deep_supervision_scales
from stunet_plugin.networks.unetr import UNETR
from stunet_plugin.networks.vision_transformer import Pruning, TokenPruning

from network_helpers import build, gradients, image, largest_difference

FIXTURES: dict[str, dict[str, Any]] = {
    "stp_unetr_r50": {
        "input_channels": 1,
        "num_classes": 3,
        "patch_size": (32, 32, 32),
        "width": 48,
        "heads": 4,
        "pruning": {"ratio": 0.5},
    },
    "stp_unetr_r75_aniso": {
        "input_channels": 2,
        "num_classes": 4,
        "patch_size": (32, 32, 48),
        "width": 36,
        "heads": 3,
        "pruning": {"ratio": 0.75, "assembly": 2, "assembly_width": 24, "assembly_heads": 2},
    },
}
NAMES = {
    r"encoder\.cls_token": "encoder.class_token",
    r"encoder\.pos_embed": "encoder.positions",
    r"encoder\.patch_embed\.proj": "encoder.patch_embedding",
    r"encoder\.score_predictor_list\.(\d)\.in_mlp\.0": r"encoder.cuts.\1.scores.norm",
    r"encoder\.score_predictor_list\.(\d)\.in_mlp\.1": r"encoder.cuts.\1.scores.token",
    r"encoder\.score_predictor_list\.(\d)\.out_mlp\.0": r"encoder.cuts.\1.scores.layers.0",
    r"encoder\.score_predictor_list\.(\d)\.out_mlp\.2": r"encoder.cuts.\1.scores.layers.1",
    r"encoder\.score_predictor_list\.(\d)\.out_mlp\.4": r"encoder.cuts.\1.scores.layers.2",
    r"encoder\.mid_norm_list": "encoder.left_norms",
    r"completion_net\.pre_linear_list": "encoder.assembly.enter",
    r"completion_net\.completion\.layer_tokens": "encoder.assembly.cut_tokens",
    r"completion_net\.out_norm": "encoder.assembly.norm",
    r"completion_net\.out_linear": "encoder.assembly.out",
    r"completion_net": "encoder.assembly",
    r"attn\.": "",
    r"mlp\.fc": "fc",
    r"decoder\.encoder1\.layer": "decoder.skip_image",
    r"decoder\.encoder2\.transp_conv_init\.conv": "decoder.skip_fine.0",
    r"decoder\.encoder2\.blocks\.0\.0\.conv": "decoder.skip_fine.1",
    r"decoder\.encoder2\.blocks\.0\.1": "decoder.skip_fine.2",
    r"decoder\.encoder3\.transp_conv_init\.conv": "decoder.skip_middle",
    r"decoder\.encoder4\.layer": "decoder.skip_tokens",
    r"decoder\.out\.conv\.conv": "decoder.seg_layers.3",
    r"conv3\.conv": "shortcut",
    r"conv([12])\.conv": r"conv\1",
}
UNREAD = ("encoder.policy", "pos_embed")
"""Tables that follow from the sizes."""


def translate(key: str) -> str:
    for pattern, ours in NAMES.items():
        key = re.sub(pattern, ours, key)
    for number in range(2, 6):
        key = key.replace(f"decoder.decoder{number}.transp_conv.conv", f"decoder.ups.{5 - number}")
        key = key.replace(f"decoder.decoder{number}.conv_block", f"decoder.units.{5 - number}")
    return key


def published(shared: Path, name: str) -> UNETR:
    strides = [[1, 1, 1], *[[2, 2, 2]] * 4]
    network = UNETR(**FIXTURES[name], strides=strides, depth=12, features=4)
    weights = torch.load(shared / "fixtures" / "network_options" / f"{name}.pt")
    ours = {translate(key): value for key, value in weights.items()}
    ours = {key: value for key, value in ours.items() if not key.endswith(UNREAD)}
    missing, unexpected = network.load_state_dict(ours, strict=False)
    assert unexpected == []
    # Heads of deep supervision are ours.
    assert all(key.startswith("decoder.seg_layers.") for key in missing)
    return network


def arrays(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "fixtures" / "network_options" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.shared
@pytest.mark.parametrize("name", FIXTURES)
def test_published_function(shared: Path, name: str) -> None:
    network, recorded = published(shared, name).eval(), arrays(shared, name)
    found: list[Tensor] = []
    assembly = network.encoder.assembly
    assembly.register_forward_hook(lambda _, given, output: found.extend((*given[:2], output)))
    with torch.no_grad():
        output = network(recorded["x"])
    parts, places, completed = found
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        torch.testing.assert_close(part, recorded[f"tokens{number}"], rtol=0, atol=1e-5)
        policy = torch.zeros_like(recorded["policy0"]).scatter(1, place, 1)
        assert torch.equal(policy[:, 1:], recorded[f"policy{number}"][:, 1:])
    assert largest_difference([completed, output], [recorded["completed"], recorded["out"]]) <= 1e-5


@pytest.mark.shared
def test_published_gradients_with_the_recorded_noise(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = arrays(shared, "stp_unetr_r50_train")
    network = published(shared, "stp_unetr_r50").train().double()
    draws = iter([recorded[f"gumbel{number}"].double() for number in range(3)])
    monkeypatch.setattr(TokenPruning, "noise", lambda self, scores: next(draws))
    output = network(recorded["x"].double())
    assert largest_difference([output], [recorded["out"].double()]) <= 1e-5
    (output * recorded["w"].double()).sum().backward()
    own = dict(network.named_parameters())
    for key, expected in recorded.items():
        if key.startswith("grad64::"):
            found = own[translate(key.removeprefix("grad64::"))].grad
            # The recorded table of sines was rounded otherwise.
            largest = float(expected.abs().max())
            torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5 * largest)


def test_tokens_kept_as_published_and_never_none() -> None:
    assert Pruning(ratio=0.9).kept(1728) == [1728, 172, 17, 1]
    assert Pruning(ratio=0.75).kept(4096) == [4096, 1024, 256, 64]
    assert Pruning(ratio=0.9).kept(64) == [64, 6, 1, 1]
    assert Pruning(ratio=0).kept(64) == [64] * 4
    for ratio in (0.0, 0.95):
        gradients(build("UNETR STP", pruning={"ratio": ratio}), image("UNETR STP"))


def test_any_patch_and_the_position_table_of_another() -> None:
    network = build("UNETR STP").eval()
    for shape in ((20, 40, 33), (32, 32, 32), (9, 9, 70)):
        outputs = network(torch.randn(1, 1, *shape))
        for scales, output in zip(deep_supervision_scales(network.strides), outputs, strict=True):
            expected = [round(size * by) for size, by in zip(shape, scales, strict=True)]
            assert list(output.shape[2:]) == expected
    x = torch.randn(1, 1, 20, 40, 33)
    longer = torch.nn.functional.pad(x, (0, 15, 0, 8, 0, 4))
    assert torch.equal(network(x)[0], network(longer)[0][:, :, :20, :40, :33])


def test_random_pruning_is_random_and_has_no_scores() -> None:
    pruning = {"after": [3, 6, 9], "ratio": 0.5, "random": True}
    network = build("UNETR STP", pruning=pruning).eval()
    assert not any("scores" in key for key, _ in network.named_parameters())
    x = image("UNETR STP")
    assert not torch.equal(network(x)[0], network(x)[0])
    gradients(network.train(), x)
    # An entry of plans, which the trainer of pruned tokens takes.
    (preset,) = (one for one in UNETR_PRESETS if one.name == "UNETR_tiny_STP")
    patch = [32, 32, 32]
    entry = preset.architecture([[1] * 3, *[[2] * 3] * 4], patch)
    entry["arch_kwargs"]["pruning"] = pruning
    planned = {"architecture": entry, "patch_size": patch}
    assert resolve(planned, preset, "UNETRTrainer_tiny_STP").architecture == entry


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [[1, 1, 1], [2, 2, 2]]}, "strides must be 5 stages of 1 or 2"),
        ({"width": 50}, "width must be divisible by heads, by 4 and by 6, not 50"),
        ({"pruning": {"ratio": 1}}, "ratio must be 0 or more, and below 1"),
        ({"pruning": {"after": [3, 12]}}, "after must be rising numbers of blocks from 1 to 11"),
        ({"pruning": {"keep": 0.5}}, "pruning has no 'keep'; it has after, ratio"),
        ({"pruning": {"random": "yes"}}, "random must be true or false, not 'yes'"),
        ({"pruning": {"assembly_width": 20}}, "divisible by assembly_heads and by 6, not 20"),
        ({"heads": 0}, "heads must be an integer >= 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("UNETR STP", **changes)
