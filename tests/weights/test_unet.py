"""Weights of nnU-Net's own networks, of nnU-Net or pretrained with nnssl: import, inspect,
plan-like. What trainers make of them is asked in tests/trainers/test_planned_trainers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import import_helpers as helpers
from conftest import Stunet
from import_helpers import make_unet, nnssl_checkpoint, unet_checkpoint, unet_entry

KINDS = ("PlainConvUNet", "ResidualEncoderUNet")
OTHER = {
    "nonlin": "torch.nn.ReLU",
    "conv_bias": False,
    "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
    "norm_op_kwargs": {"eps": 1e-3, "affine": True},
    "n_conv_per_stage_decoder": [1, 3, 2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, OTHER], ids=["usual", "other"])
def test_an_imported_model_is_the_same_network(
    kind: str, changes: dict[str, Any], stunet: Stunet, tmp_path: Path
) -> None:
    """From a model folder; sizes come from the tensors, what these do not tell from the plan."""
    entry = unet_entry(kind, **changes)
    given = unet_checkpoint(tmp_path / "given" / "fold_0" / "checkpoint_final.pth", entry)
    model = stunet.model(given.parents[1])
    assert helpers.configuration(model)["architecture"] == entry
    assert helpers.read(model, "dataset")["labels"]["d"] == 4
    predictor = helpers.load_model(model, stunet.patch)
    image, network = torch.randn(1, 1, 16, 32, 32), make_unet(entry)
    with torch.no_grad():
        assert torch.equal(predictor.network(image), network(image))
    checkpoint = helpers.checkpoint_in(model)
    assert checkpoint["trainer_name"] == "PlannedTrainer"
    assert checkpoint["inference_allowed_mirroring_axes"] is None
    # Tensors with several names are written once.
    size = sum(x.numel() * x.element_size() for x in network.parameters())
    assert helpers.checkpoint_of(model).stat().st_size < 1.5 * size + 200_000


def test_plans_before_nnunet_2_3_do_not_name_the_network(stunet: Stunet, tmp_path: Path) -> None:
    """As in TotalSegmentator's models: the tensors tell all that is not nnU-Net's custom."""
    entry = unet_entry("PlainConvUNet")
    content = torch.load(unet_checkpoint(tmp_path / "x.pth", entry), weights_only=True)
    chosen = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    del chosen["architecture"]
    chosen |= {"UNet_class_name": "PlainConvUNet", "pool_op_kernel_sizes": helpers.UNET_STRIDES}
    torch.save(content, tmp_path / "x.pth")
    model = stunet.model(tmp_path / "x.pth")
    assert helpers.configuration(model)["architecture"] == entry


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem", [None, "repeat", "zeros"])
def test_other_channels(kind: str, stem: str | None, stunet: Stunet, tmp_path: Path) -> None:
    entry = unet_entry(kind)
    options = "--in-channels 3" + (f" --stem {stem}" if stem else "")
    model = stunet.model(unet_checkpoint(tmp_path / "x.pth", entry), options)
    network, adapted = make_unet(entry), make_unet(entry, channels=3)
    adapted.load_state_dict(helpers.checkpoint_in(model)["network_weights"])
    image = torch.randn(1, 1, 16, 32, 32)
    others = torch.randn(1, 2, 16, 32, 32) if stem == "zeros" else image.repeat(1, 2, 1, 1, 1)
    with torch.no_grad():
        expected = network.encoder(image)[0]
        found = adapted.encoder(torch.cat((image, others), dim=1))[0]
    # Repeated kernels give three times the response, less its bias, before the norm.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.3 if stem == "repeat" else 1e-4)
    fewer = stunet.refuse_import(helpers.checkpoint_of(model), "--in-channels 2 --stem zeros")
    assert "more image channels than the 3" in fewer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "prefix"), [("", ""), ("encoder.", ""), ("encoder.", "net.")])
def test_nnssl_says_where_encoder_and_stem_are(
    kind: str, part: str, prefix: str, stunet: Stunet, planned: Path, tmp_path: Path
) -> None:
    entry = unet_entry(kind)
    file = nnssl_checkpoint(tmp_path / "ssl.pth", entry, part, prefix)
    model = stunet.model(file, "--in-channels 2")
    weights = helpers.checkpoint_in(model)["network_weights"]
    network = make_unet(entry, outputs=1)
    assert ("decoder.stages.0.convs.0.conv.weight" in weights) == (part == "")
    assert not any("seg_layers" in name or "projector" in name for name in weights)
    first = "encoder.stem." if kind == KINDS[1] else "encoder.stages.0.0."
    for name, value in weights.items():
        if first not in name:
            assert torch.equal(value, network.state_dict()[name])
    for given, channels in ((file, 1), (model, 2)):
        said = stunet("inspect", given)
        assert f"{channels} input channel(s), {'encoder only' if part else ''}" in said
        assert "spacing 1 x 1 x 1 mm, patch 16 x 32 x 32" in said
    stunet("plan-like", model, "-d 7")
    written = helpers.configuration(planned, f"{kind}Plans_like_model")
    assert written["architecture"] == entry
    assert written["spacing"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture_plans/arch_class_name": "PrimusM"}, "transformer PrimusM. Only"),
        ({"key_to_encoder": "encoder.eva"}, "called 'encoder.eva', but none is"),
        ({"key_to_stem": 3}, "key_to_stem must be text, not 3"),
        ({"architecture_plans": None}, "architecture_plans is a NoneType"),
        ({"architecture_plans/arch_kwargs/nonlin": "os.system"}, "nonlin must be one of"),
    ],
)
def test_adaptation_plans_that_are_of_no_use_are_refused(
    changes: dict[str, Any], message: str, stunet: Stunet, tmp_path: Path
) -> None:
    file = nnssl_checkpoint(tmp_path / "ssl.pth", unet_entry(), **changes)
    assert message in stunet.refuse_import(file)


def test_what_is_no_segmentation_model_is_not_imported_as_one(
    stunet: Stunet, tmp_path: Path
) -> None:
    options = "--spacing 1 1 1 --patch-size 16 32 32"
    file = nnssl_checkpoint(tmp_path / "ssl.pth", unet_entry(), "encoder.")
    assert "an encoder without a decoder" in stunet.refuse_import(file, options)
    # A decoder without skips is none that nnU-Net's networks could use.
    changes = {"architecture_plans/arch_class_name": "NoSkipResEncL"}
    file = nnssl_checkpoint(tmp_path / "ssl.pth", unet_entry(), **changes)
    assert "encoder only" in stunet("inspect", file)


def test_weights_that_do_not_fit_themselves_are_refused(stunet: Stunet, tmp_path: Path) -> None:
    entry = unet_entry()
    weights = make_unet(entry).state_dict()
    del weights["encoder.stages.1.blocks.1.conv2.conv.weight"]
    file = unet_checkpoint(tmp_path / "x.pth", entry, network_weights=weights)
    assert "tensors are missing (for example encoder.stages.1" in stunet.refuse_import(file)
    flat = unet_entry(conv_op="torch.nn.Conv2d", kernel_sizes=[[3, 3]] * 4, strides=[1, 2, 2, 2])
    flat["arch_kwargs"]["norm_op"] = "torch.nn.InstanceNorm2d"
    weights = make_unet(flat).state_dict()
    file = unet_checkpoint(tmp_path / "x.pth", entry, network_weights=weights)
    assert "not of a convolution with 3 axes" in stunet.refuse_import(file)
