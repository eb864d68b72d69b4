"""PCT-Net and FMUNet against plain transcriptions of the published code: outputs, gradients,
statistics."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.networks.anisotropy import MODES
from stunet_plugin.networks.presets import MISFM_PRESETS
from stunet_plugin.weights import misfm_keys

from network_helpers import NO_DROPOUT, SMALL, build, gradients, plain_module, randomise

SIZE = (16, 32, 32)


@pytest.mark.parametrize("mode", [0, 2])
def test_fmunet(mode: int) -> None:
    plain = plain_module("fmunet").PlainFMUNet
    published = randomise(plain(1, 3, mode, *SMALL.values(), *NO_DROPOUT.values(), True)).double()
    ours = build(f"FMUNet {mode}", **NO_DROPOUT).double()
    ours.load_state_dict(misfm_keys.translate_fmunet(published.state_dict()))
    x = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-9, atol=1e-9)
    expected = misfm_keys.translate_fmunet(gradients(published, x))
    torch.testing.assert_close(gradients(ours, x), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", [0, 2])
def test_pctnet(mode: int) -> None:
    """Gradients of bias tables aside: published offsets share rows."""
    plain = plain_module("pctnet").PlainPCTNet
    published = plain(1, 3, mode, SIZE, *SMALL.values(), *NO_DROPOUT.values(), True)
    randomise(published).double()
    for part in published.modules():
        if hasattr(part, "drop_path"):
            part.drop_path = lambda x: x
    ours = build(f"PCTNet {mode}", **NO_DROPOUT, drop_path=0.0).double()
    ours.load_state_dict(misfm_keys.translate_pctnet(published.state_dict(), mode))
    x = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    results = [network(x) for network in (ours, published)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    for outputs in results:
        sum(output.square().mean() for output in outputs).backward()
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in published.named_parameters()
    }
    translated = misfm_keys.translate_pctnet(expected, mode)
    for name, parameter in ours.named_parameters():
        if not name.endswith("bias_table"):
            torch.testing.assert_close(parameter.grad, translated[name], rtol=1e-8, atol=1e-10)
    # Running statistics count the batch once.
    buffers = misfm_keys.translate_pctnet(published.state_dict(), mode)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", range(3))
def test_parameter_counts(mode: int) -> None:
    for preset in MISFM_PRESETS:
        architecture = preset.architecture(MODES[mode]).values()
        with torch.device("meta"):
            ours = get_network_from_plans(*architecture, 1, 5, deep_supervision=True)
        assert sum(value.numel() for value in ours.parameters()) == preset.parameters[mode]
