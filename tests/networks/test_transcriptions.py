"""PCT-Net and FMUNet against plain transcriptions of the published code: outputs, gradients,
statistics."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.networks import fmunet, pctnet
from stunet_plugin.networks.anisotropy import MODES
from stunet_plugin.networks.presets import FMUNET, MISFM_PRESETS, PCTNET
from stunet_plugin.weights import misfm_keys

from network_helpers import NO_DROPOUT, SMALL, build, gradients, plain_module, randomise

SIZE = (16, 32, 48)


def test_fmunet() -> None:
    plain = plain_module("fmunet").PlainFMUNet
    published = randomise(plain(1, 3, 1, *SMALL.values(), *NO_DROPOUT.values(), True)).double()
    ours = build("FMUNet 1", **NO_DROPOUT).double()
    ours.load_state_dict(misfm_keys.translate_fmunet(published.state_dict()))
    x = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-9, atol=1e-9)
    expected = misfm_keys.translate_fmunet(gradients(published, x))
    torch.testing.assert_close(gradients(ours, x), expected, rtol=1e-7, atol=1e-9)


def test_pctnet() -> None:
    """Gradients of bias tables aside: published offsets share rows."""
    plain = plain_module("pctnet").PlainPCTNet
    published = plain(1, 3, 1, SIZE, *SMALL.values(), *NO_DROPOUT.values(), True)
    randomise(published).double()
    for part in published.modules():
        if hasattr(part, "drop_path"):
            part.drop_path = lambda x: x
    ours = build("PCTNet 1", **NO_DROPOUT, drop_path=0.0).double()
    ours.load_state_dict(misfm_keys.translate_pctnet(published.state_dict(), 1))
    x = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    results = [network(x) for network in (ours, published)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    for outputs in results:
        sum(output.square().mean() for output in outputs).backward()
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in published.named_parameters()
    }
    translated = misfm_keys.translate_pctnet(expected, 1)
    for name, parameter in ours.named_parameters():
        if not name.endswith("bias_table"):
            torch.testing.assert_close(parameter.grad, translated[name], rtol=1e-8, atol=1e-10)
    # Running statistics count the batch once.
    buffers = misfm_keys.translate_pctnet(published.state_dict(), 1)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", range(3))
def test_published_parameter_counts(mode: int) -> None:
    for preset in MISFM_PRESETS:
        architecture = preset.architecture(MODES[mode]).values()
        with torch.device("meta"):
            ours = get_network_from_plans(*architecture, 1, 5, deep_supervision=True)
        assert sum(value.numel() for value in ours.parameters()) == preset.parameters[mode]
    plain = plain_module("fmunet").PlainFMUNet
    with torch.device("meta"):
        published = plain(1, 5, mode, fmunet.FEATURES, fmunet.DROPOUT, True)
    count = sum(parameter.numel() for parameter in published.parameters())
    assert count == FMUNET.published_parameters[mode]
    plain = plain_module("pctnet").PlainPCTNet
    with torch.device("meta"):
        published = plain(1, 5, mode, (64, 128, 128), pctnet.FEATURES, pctnet.DROPOUT, True)
    parameters = dict(published.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    assert sum(sizes.values()) == PCTNET.published_parameters[mode]
    # What a mode leaves unused is not in ours, whose tables are those of full windows.
    used = (f"embeddings.{mode}.", f"pred_heads.{mode}.", "pyramid_ct.")
    kept = [name for name in sizes if name.startswith(used) and ".norm_layer." not in name]
    tables = [parameter for name, parameter in parameters.items() if "table" in name]
    longer = sum(11**3 * table.shape[1] - table.numel() for table in tables)
    assert PCTNET.parameters[mode] == sum(sizes[name] for name in kept) + longer
