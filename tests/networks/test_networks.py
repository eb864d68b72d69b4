"""All networks: what nnU-Net, torch.compile, ONNX and loaders of weights expect of every one."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_engine
from stunet_plugin.weights import misfm_keys, stunet

from network_helpers import (
    ISOTROPIC,
    NETWORKS,
    ONE_OF_EACH,
    THICK,
    build,
    gradients,
    image,
    largest_difference,
)

V1 = {"features_per_stage": [4, 8, 16, 32, 64, 64], "strides": [*ISOTROPIC[:5], [1, 1, 2]]}
V2: dict[str, Any] = {"input_channels": 2, "n_blocks_per_stage": 2, "n_blocks_per_stage_decoder": 2}
V2 |= {"strides": [*THICK[:5], [1, 2, 2]]}
FIXTURES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "stunet_v1_tiny.model": ("STUNet", V1 | {"num_classes": 5}, stunet.translate_state_dict),
    "stunet_v2_tiny.pth": ("STUNet", V2, stunet.translate_state_dict),
}
for mode, file in enumerate(("pctnet_mode0_tiny", "pctnet_tiny", "pctnet_mode2_tiny")):
    translate = functools.partial(misfm_keys.translate_pctnet, mode=mode)
    FIXTURES[f"{file}.pt"] = f"PCTNet {mode}", {"num_classes": 5}, translate
    found = f"FMUNet {mode}", {"num_classes": 5}, misfm_keys.translate_fmunet
    FIXTURES[f"fmunet_mode{mode}_tiny.pt"] = found


@pytest.mark.shared
@pytest.mark.parametrize("file", FIXTURES)
def test_published_function(shared: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and without, in torch: OpenVINO takes bfloat16 on some processors."""
    monkeypatch.setenv("STUNET_CPU", "torch")
    network, recorded = published(shared, file)
    prefix = "mode1_" if file == "pctnet_tiny.pt" else ""
    outputs = sorted(key for key in recorded if key.startswith(f"{prefix}output_"))
    expected, x = [recorded[key] for key in outputs], recorded["input"]
    assert largest_difference(network(x), expected) <= 1e-5
    with torch.no_grad():
        assert largest_difference(network(x), expected) <= 1e-5
        network.decoder.deep_supervision = False
        assert largest_difference([network(x)], expected[:1]) <= 1e-5


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("file", FIXTURES)
def test_published_function_by_the_cpu_engine(
    shared: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUNET_HOME", str(tmp_path))
    monkeypatch.setenv("STUNET_CPU", "openvino")
    monkeypatch.setattr(cpu_engine, "SMALLEST_IMAGE", 0)
    network, recorded = published(shared, file)
    prefix = "mode1_" if file == "pctnet_tiny.pt" else ""
    network.decoder.deep_supervision = False
    with torch.inference_mode():
        output = network(recorded["input"])
    assert cpu_engine.precision_in_use() == "float32"
    assert largest_difference([output], [recorded[f"{prefix}output_0"]]) <= 1e-5


def published(shared: Path, file: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A network with a fixture's weights, and what is recorded of it."""
    name, changes, translate = FIXTURES[file]
    # The fixtures hold numpy scalars besides tensors and come with the project.
    saved = torch.load(shared / "fixtures" / file, map_location="cpu", weights_only=False)
    keys = ("state_dict", "network_weights", "model_state_dict")
    network = build(name, **changes).eval()
    network.load_state_dict(translate(next(saved[key] for key in keys if key in saved)))
    arrays = np.load(shared / "fixtures" / f"{file.rpartition('.')[0]}.npz")
    return network, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_keys_of_other_networks_are_refused() -> None:
    for file, network in (("stunet_v2_tiny.pth", "STU-Net"), ("pctnet_tiny.pt", "PCT-Net")):
        with pytest.raises(PluginError, match=rf"block1\.weight.*published {network}"):
            FIXTURES[file][2]({"block1.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_pair_with_targets_and_every_parameter_gets_a_gradient(name: str) -> None:
    network, x = build(name), image(name)
    gradients(network, x)
    outputs, shape = network.eval()(x), x.shape[2:]
    assert len(outputs) == len(network.strides) - 1
    for output, stride in zip(outputs, network.strides[:-1], strict=True):
        shape = tuple(size // step for size, step in zip(shape, stride, strict=True))
        assert output.shape == (2, 3, *shape)
        assert output.is_contiguous()
    # One state dict with and without deep supervision.
    alone = build(name, deep_supervision=False).eval()
    alone.load_state_dict(network.state_dict())
    torch.testing.assert_close(alone(x), outputs[0], rtol=0, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(output.isfinite().all() for output in network.train()(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_are_where_loaders_look_for_them(name: str) -> None:
    network = build(name)
    own = dict(network.named_parameters())
    encoder, stem = map(network.get_submodule, (network.key_to_encoder, network.key_to_stem))
    if "UNETR" in name:
        assert (encoder, stem) == (network.encoder, network.encoder.patch_embedding)
    else:
        assert encoder is network.encoder.stages
        assert stem is network.encoder.stages[0]

    def differing(**changes: int) -> set[str]:
        other = build(name, **changes).named_parameters()
        return {key for key, parameter in other if parameter.shape != own[key].shape}

    channels = {f"{key}.weight" for key in network.keys_to_in_proj}
    assert differing(input_channels=3) == channels
    heads = differing(num_classes=7)
    assert heads
    # Shape priors are maps of the classes.
    assert all(".seg_layers." in key or key.startswith("shape_priors.") for key in heads)


@pytest.mark.parametrize("name", ["STUNet 2D", *ONE_OF_EACH])
def test_feature_map_size_counts_every_layer(name: str) -> None:
    network, x, elements = build(name).eval(), image(name, batch=1), []
    with register_module_forward_hook(lambda *call: elements.append(call)):
        network(x)
    kinds = nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d, nn.Linear
    expected = sum(output.numel() for layer, _, output in elements if isinstance(layer, kinds))
    assert network.compute_conv_feature_map_size(x.shape[2:]) == expected


def test_checkpointing_the_pyramid_changes_nothing() -> None:
    networks = build("PCTNet 1"), build("PCTNet 1", checkpoint_pyramid=True)
    expected, found = (gradients(network, image("PCTNet 1")) for network in networks)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exports_to_onnx(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, x = build(name, deep_supervision=False).eval(), image(name, batch=1)
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(network, (x,), dynamo=True).save(file)
        expected = network(x)
    session = onnxruntime.InferenceSession(file.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert largest_difference([torch.from_numpy(output)], [expected]) <= 1e-4


@pytest.mark.parametrize("name", ["STUNet thick", "FMUNet 1", "PCTNet 1"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_at_another_size_or_raises(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows of PCT-Net are those of the traced size."""
    monkeypatch.setenv("STUNET_CPU", "torch")
    network = build(name, deep_supervision=False).eval()
    # PCT-Net has as many windows at the first size as at the traced one.
    scale = 1 if "PCT" in name else 2
    sizes = ((32, 64, 64), (16, 64, 64), (32, 64, 96), (64, 64, 32), (16, 128, 64))
    traced_at, *others = (tuple(length // scale for length in size) for size in sizes)
    with torch.no_grad():
        traced = torch.jit.trace(network, torch.randn(1, 1, *traced_at), check_trace=False)
        for shape in others:
            x = torch.randn(1, 1, *shape)
            if "PCT" in name and shape != (16, 64, 64):
                with pytest.raises(RuntimeError, match="must match the size"):
                    traced(x)
            else:
                torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-4)


def test_he_initialisation() -> None:
    stage = build("STUNet", features_per_stage=[16, 32, 64, 64, 64, 64]).encoder.stages[3]
    expected = (2 / (1 + 1e-2**2) / (64 * 27)) ** 0.5
    assert stage[0].conv2.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not stage[0].conv2.bias.any()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("STUNet", {"conv_op": nn.Linear}, "conv_op must be torch.nn.Conv2d or torch.nn.Conv3d"),
        ("STUNet", {"features_per_stage": [4, 8]}, "features_per_stage must be 6 positive"),
        ("STUNet", {"strides": [[2, 2, 2]] * 6}, r"strides\[0\] must be all ones"),
        ("STUNet", {"strides": [[1.5, 1, 1], *ISOTROPIC[1:]]}, "strides: Expected"),
        ("STUNet", {"kernel_sizes": 2}, "Kernel sizes must be odd"),
        ("STUNet", {"num_classes": 0}, "num_classes must be an integer >= 1"),
        ("PCTNet 1", {"mode": 3}, r"Unknown anisotropy mode 3\. Modes: 0 .* 1 .* 2 "),
        ("FMUNet 1", {"strides": [[1, 1], [2, 2]]}, "has strides .*STUNetTrainer for 2d"),
        ("FMUNet 1", {"dropout_per_stage": (0, 0, 0, 0, 1)}, "dropout_per_stage must be 5 numbers"),
        ("PCTNet 1", {"num_heads": (3, 4, 8)}, r"num_heads must divide .*\[16, 32, 64\]"),
        ("PCTNet 1", {"window_size": 1}, "window_size must be an integer >= 2, not 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


@pytest.mark.parametrize("name", [one for one in ONE_OF_EACH if "UNETR" not in one])
def test_input_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(PluginError, match=r"not \[32, 32, 33\].*\[32, 32, 32\] and \[32, 32, "):
        build(name)(torch.randn(1, 1, 32, 32, 33))
