"""Prediction on the CPU: the plain forward's function, only where it may be taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stunet_plugin.networks import cpu_inference

from network_helpers import ISOTROPIC, build, image, randomise

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 3, 1], [2, 2, 2], [1, 1, 1], [1, 2, 2]]


@pytest.mark.parametrize(
    ("name", "changes", "shape"),
    [
        ("STUNet", {"n_blocks_per_stage": 2}, (32, 64, 32)),
        ("STUNet", {"strides": STRIDES}, (32, 48, 32)),
        ("STUNet", {"kernel_sizes": [[1, 1, 1]] * 3 + [[1, 3, 3]] * 3}, (32, 32, 64)),
        ("STUNet", {"kernel_sizes": 1, "strides": [*ISOTROPIC[:5], [1, 2, 4]]}, (16, 64, 64)),
        ("PCTNet 0", {}, (16, 48, 32)),
        ("PCTNet 1", {}, (16, 32, 48)),
        ("PCTNet 2", {}, (28, 32, 32)),
        ("FMUNet 0", {}, (16, 32, 32)),
        ("FMUNet 1", {}, (16, 32, 48)),
        ("FMUNet 2", {}, (12, 32, 32)),
    ],
)
def test_plain_forwards_function(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    network: Any = randomise(build(name, **changes)).double().eval()
    x = torch.randn(2, 1, *shape, dtype=torch.float64)
    before = x.clone()
    expected = network(x)
    # As if the input were large, in many slabs.
    monkeypatch.setattr(cpu_inference, "SMALLEST_IMAGE", 0)
    monkeypatch.setattr(cpu_inference, "SMALLEST_MAP", 1)
    monkeypatch.setattr(cpu_inference, "SLAB_ELEMENTS", 5000)
    with torch.no_grad():
        assert cpu_inference.applies(network, x)
        outputs = network(x)
        network.decoder.deep_supervision = False
        outputs.append(network(x))
    for output, plain in zip(outputs, [*expected, expected[0]], strict=True):
        assert output.grad_fn is None
        assert output.is_contiguous()
        torch.testing.assert_close(output, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())
    assert torch.equal(x, before)


def test_only_where_it_may_be_taken() -> None:
    applies = cpu_inference.applies
    network, x = build("STUNet").eval(), torch.empty(1, 1, 64, 64, 64)
    assert not applies(network, x)  # gradients
    with torch.no_grad():
        assert applies(network, x)
        assert not applies(network, image("STUNet"))  # small
        assert not applies(network, x.bfloat16())
        assert not applies(network, x.to("meta"))
        assert not applies(network.train(), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not applies(network.eval(), x)
        network.decoder.seg_layers[0].register_forward_pre_hook(lambda *_: None)
        assert not applies(network, x)
