"""Fine-tuning options: warm-up, a frozen encoder, a lower rate for the encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.options import ENCODER_RATE, EPOCHS, OPTIONS, Options
from stunet_plugin.trainers.base_trainer import FineTuningScheduler, parameter_groups


@pytest.fixture
def network() -> STUNet:
    return STUNet(1, 2, 3, [2, 4, 8], nn.Conv3d, 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]], 1, 1)


def rates(scheduler: PolyLRScheduler, epochs: int) -> list[list[float]]:
    result = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        result.append([group["lr"] for group in scheduler.optimizer.param_groups])
    return result


def test_warmup_rises_to_nnunets_schedule_and_follows_it(network: STUNet) -> None:
    ours, stock = (torch.optim.SGD(network.parameters(), 0.1) for _ in range(2))
    warmed = [lrs[0] for lrs in rates(FineTuningScheduler(ours, 0.1, 10, warmup_epochs=3), 10)]
    poly = [lrs[0] for lrs in rates(PolyLRScheduler(stock, 0.1, 10), 10)]
    assert warmed[3:] == pytest.approx(poly[3:])
    assert np.divide(warmed[:3], poly[:3]) == pytest.approx([0.25, 0.5, 0.75])


def test_encoder_has_a_rate_of_its_own(network: STUNet) -> None:
    optimizer = torch.optim.SGD(parameter_groups(network, 0.1), 0.01)
    rest, encoder = (len(group["params"]) for group in optimizer.param_groups)
    assert encoder == len(list(network.encoder.parameters()))
    assert rest + encoder == len(list(network.parameters()))
    for slow, slower in rates(FineTuningScheduler(optimizer, 0.01, 5, warmup_epochs=0), 5):
        assert slower == pytest.approx(0.1 * slow)
    assert len(parameter_groups(network, 1.0)) == 1


def test_options_are_parsed_and_refused() -> None:
    assert Options({}).lines() == []
    options = Options({"STUNET_EPOCHS": "7", "STUNET_ENCODER_RATE": "0.1"})
    assert options.whole(EPOCHS, 1000) == 7
    assert options.fraction(ENCODER_RATE, 1.0) == 0.1
    for variable, text, message in (
        ("STUNET_EPOCHS", "0", "an integer from 1 to 1000000"),
        ("STUNET_EPOCHS", "1.5", "an integer from 1 to 1000000"),
        ("STUNET_ENCODER_RATE", "2", "a number from 0 to 1"),
        ("STUNET_ENCODER_RATE", "nan", "a number from 0 to 1"),
        ("STUNET_SEED", "-1", "an integer from 0 to"),
    ):
        with pytest.raises(PluginError, match=f"{variable}='{text}' must be {message}"):
            Options({variable: text})
    with pytest.raises(
        PluginError,
        match="STUNET_EPOCH is set, but there is no such option. Did you mean STUNET_EPOCHS",
    ):
        Options({"STUNET_EPOCH": "3"})
    assert len({option.variable for option in OPTIONS}) == len(OPTIONS)
