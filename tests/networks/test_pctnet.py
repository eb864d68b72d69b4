"""PCT-Net: the published function in its three modes, every parameter in use, any size of input,
less memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import MODES
from stunet_plugin.networks.pctnet import DROPOUT, FEATURES, PCTNet
from stunet_plugin.networks.presets import PCTNET
from stunet_plugin.weights.misfm_keys import translate_pctnet

from misfm_helpers import (
    SMALL,
    check_fixture,
    check_half_precision,
    check_interface,
    check_no_graph_breaks,
    check_outputs_and_gradients,
    check_refused_inputs,
    check_slab_by_slab,
    plain_network,
    randomise,
)

FIXTURES = {
    0: ("pctnet_mode0_tiny", ""),
    1: ("pctnet_tiny", "mode1_"),
    2: ("pctnet_mode2_tiny", ""),
}
NO_DROPOUT = {"dropout_per_stage": (0.0,) * 5, "drop_path": 0.0}


def tiny(mode: int = 1, **changes: Any) -> PCTNet:
    torch.manual_seed(0)
    network = PCTNet(
        **{
            "input_channels": 1,
            "num_classes": 3,
            "mode": mode,
            **SMALL,
            "deep_supervision": True,
            **changes,
        }
    )
    network.apply(network.initialize)
    return network


@pytest.fixture
def plain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    return plain_network("PCTNet", repository, monkeypatch)


@pytest.mark.shared
@pytest.mark.parametrize("mode", FIXTURES)
def test_published_function(shared: Path, mode: int) -> None:
    translate = functools.partial(translate_pctnet, mode=mode)
    check_fixture(tiny(mode, num_classes=5), shared / "fixtures", *FIXTURES[mode], translate)


@pytest.mark.parametrize(
    ("mode", "size"), [(0, (32, 48, 32)), (1, (16, 32, 48)), (2, (28, 32, 32))]
)
def test_prediction_slab_by_slab_is_the_published_function(
    plain: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    size: tuple[int, ...],
) -> None:
    published = randomise(plain(2, 4, mode, size, *SMALL.values(), DROPOUT, True)).double().eval()
    network = tiny(mode, input_channels=2, num_classes=4).double().eval()
    network.load_state_dict(translate_pctnet(published.state_dict(), mode))
    check_slab_by_slab(network, published, size, monkeypatch, 1e-12)


def test_computing_again_changes_no_gradient(plain: Callable[..., nn.Module]) -> None:
    """Against the plain network, which keeps everything; table gradients aside, since published
    offsets share rows."""
    size = (16, 32, 48)
    published = randomise(plain(1, 3, 1, size, *SMALL.values(), (0.0,) * 5, True)).double()
    network = tiny(**NO_DROPOUT).double()
    network.load_state_dict(translate_pctnet(published.state_dict(), 1))
    for (
        part
    ) in published.modules():  # The plain network has a constant in place of the drop-path option.
        if hasattr(part, "drop_path"):
            part.drop_path = lambda x: x
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    for each in (published, network):
        sum(output.square().mean() for output in each(x)).backward()
    expected = {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in published.named_parameters()
    }
    translated = translate_pctnet(expected, 1)
    for name, parameter in network.named_parameters():
        if not name.endswith("bias_table"):
            torch.testing.assert_close(parameter.grad, translated[name], rtol=1e-8, atol=1e-10)
    # Running statistics count the batch once.
    buffers = translate_pctnet(published.state_dict(), 1)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-12)


def test_checkpointing_the_pyramid_changes_nothing() -> None:
    x = torch.randn(2, 1, 16, 48, 32)
    results = []
    for checkpointing in (False, True):
        network = tiny(checkpoint_pyramid=checkpointing)
        torch.manual_seed(1)
        sum(output.square().mean() for output in network(x)).backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append({**gradients, **dict(network.named_buffers())})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("mode", range(3))
def test_parameters_are_the_published_ones_less_what_a_mode_leaves_unused(
    plain: Any, mode: int
) -> None:
    with torch.device("meta"):
        ours = PCTNet(1, 5, mode)
        published = plain(1, 5, mode, (64, 128, 128), FEATURES, DROPOUT, True)
    sizes = {name: parameter.numel() for name, parameter in published.named_parameters()}
    assert sum(sizes.values()) == PCTNET.published_parameters[mode]
    used = (f"embeddings.{mode}.", f"pred_heads.{mode}.", "pyramid_ct.")
    unused = sum(
        size for name, size in sizes.items() if not name.startswith(used) or ".norm_layer." in name
    )
    # Our tables are those of full windows, whatever the patch.
    shorter = sum(
        11**3 * table.shape[1] - table.numel()
        for name, table in published.named_parameters()
        if "table" in name
    )
    assert PCTNET.parameters[mode] == sum(parameter.numel() for parameter in ours.parameters())
    assert PCTNET.parameters[mode] == PCTNET.published_parameters[mode] - unused + shorter


@pytest.mark.parametrize(("mode", "size"), [(0, (32, 48, 48)), (1, (8, 48, 32)), (2, (12, 32, 80))])
def test_outputs_pair_and_every_parameter_gets_a_gradient(mode: int, size: tuple[int, ...]) -> None:
    check_outputs_and_gradients(tiny(mode), size)


def test_what_nnunet_expects() -> None:
    check_interface(tiny(), tiny(input_channels=3), tiny(num_classes=7), (16, 48, 32))


def test_published_initialisation() -> None:
    network = tiny(features_per_stage=(16, 32, 64, 64, 64))
    block = network.encoder.stages[3][2]
    convolution, table = (
        block.conv[1].conv,
        block.transformer.blocks[1].attention.relative_position_bias_table,
    )
    bound = (64 * 27) ** -0.5  # torch's own: uniform, both for weights and biases
    assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert convolution.bias.abs().max() <= bound
    assert table.std().item() == pytest.approx(0.02, rel=0.05)
    assert {part.weight.item() for part in network.modules() if isinstance(part, nn.PReLU)} == {
        0.25
    }


def test_every_batch_norm_can_be_synchronised() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(tiny())
    kinds = [
        type(part)
        for part in network.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    assert set(kinds) == {nn.SyncBatchNorm}
    assert network.state_dict().keys() == tiny().state_dict().keys()


@pytest.mark.parametrize(
    ("training", "changes"),
    [(True, {}), (True, {"checkpoint_pyramid": True}), (False, {"deep_supervision": False})],
)
def test_no_graph_breaks(training: bool, changes: dict[str, Any]) -> None:
    check_no_graph_breaks(tiny(**changes), training)


def test_runs_in_half_precision_under_autocast() -> None:
    check_half_precision(tiny())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": 3}, r"Unknown anisotropy mode 3\. Modes: 0 .* 1 .* 2 "),
        ({"mode": None}, "Unknown anisotropy mode None"),
        ({"strides": [[1, 1], [2, 2]]}, "strides of 2 axes. .*STUNetTrainer for 2d"),
        ({"strides": MODES[2].strides}, r"mode 1 has strides \[\[1, 1, 1\], \[1, 2, 2\].* not "),
        ({"features_per_stage": (4, 8, 16)}, "features_per_stage must be 5 positive whole numbers"),
        (
            {"dropout_per_stage": (0, 0, 0, 0, 1)},
            "dropout_per_stage must be 5 numbers of at least 0 and below 1",
        ),
        (
            {"num_heads": (3, 4, 8)},
            r"num_heads must be 3 whole numbers that divide the channels \[16, 32, 64\]",
        ),
        ({"num_heads": (4, 8)}, "num_heads must be 3"),
        ({"window_size": 1}, "window_size must be a whole number of at least 2, not 1"),
        ({"depth": 0}, "depth must be a whole number of at least 1, not 0"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_input_that_does_not_fit_is_refused() -> None:
    check_refused_inputs(tiny())


def test_keys_of_other_networks_are_refused() -> None:
    with pytest.raises(PluginError, match=r"block1\.weight.*published PCT-Net"):
        translate_pctnet({"block1.weight": torch.zeros(1)}, 0)


@pytest.mark.shared
def test_batch_norm_trained_at_batch_2_predicts_as_it_trained(shared: Path) -> None:
    """On real images: with running statistics the loss is that of training, whatever the batch,
    once they have settled."""
    images, targets = zip(*(hippocampus(shared, index) for index in range(4)), strict=True)
    x, y = torch.stack(images), torch.stack(targets)
    network = tiny(0, **NO_DROPOUT)
    network.decoder.deep_supervision = False
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    network.train()
    for step in range(30):
        pair = slice(2 * (step % 2), 2 * (step % 2) + 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[pair]), y[pair]).backward()
        optimizer.step()

    def loss(batch: int) -> float:
        with torch.no_grad():
            parts = zip(x.split(batch), y.split(batch), strict=True)
            return float(
                torch.stack(
                    [nn.functional.cross_entropy(network(part), wanted) for part, wanted in parts]
                ).mean()
            )

    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # What is measured shall not change the running statistics.
    in_training = loss(2)
    network.eval()
    predicting = (loss(2), loss(1))
    assert in_training < math.log(3)
    assert predicting == pytest.approx([in_training] * 2, rel=0.1)
    assert predicting[0] == pytest.approx(predicting[1], rel=1e-5)


def hippocampus(shared: Path, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middle [32, 32, 32] of a real case, normalised, and its labels."""
    folder = shared / "data" / "Dataset004_Hippocampus"
    label = sorted((folder / "labelsTr").glob("*.nii.gz"))[index]
    files = (folder / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz"), label)
    image, wanted = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32) for file in files
    )
    image = (image - image.mean()) / image.std()
    middle = tuple(
        slice(max((extent - 32) // 2, 0), max((extent - 32) // 2, 0) + 32) for extent in image.shape
    )
    padding = [(0, 32 - min(extent, 32)) for extent in image.shape]
    image, wanted = (np.pad(array[middle], padding) for array in (image, wanted))
    return torch.from_numpy(image)[None], torch.from_numpy(wanted).long()
