"""OpenVINO on the CPU: every network's function, new weights, and where torch goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_engine

from network_helpers import NETWORKS, build, image, randomise


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is large enough; nothing is compiled yet."""
    monkeypatch.setenv("STUNET_HOME", str(tmp_path))
    monkeypatch.setenv("STUNET_CPU", "openvino")
    monkeypatch.setattr(cpu_engine, "SMALLEST_IMAGE", 0)
    cpu_engine._compiled.clear()


def network_of(name: str, **changes: Any) -> Any:
    return randomise(build(name, deep_supervision=False, **changes)).eval()


def shallow() -> Any:
    """A network of two stages, which is exported and converted quickly."""
    few = {"n_stages": 2, "features_per_stage": [4, 8], "strides": [[1, 1], [2, 2]]}
    return network_of("STUNet 2D", **few)


def plain(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("STUNET_CPU", "torch")
        output: torch.Tensor = network(x)
    return output


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "STUNet" else pytest.mark.slow) for name in NETWORKS],
)
def test_function_of_the_network(name: str) -> None:
    network, x = network_of(name), image(name, batch=1)
    with torch.inference_mode():
        output = network(x)
        assert cpu_engine.precision_in_use() == "float32"
        expected = plain(network, x)
        torch.testing.assert_close(
            output, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
        # Predictions that are kept do not change with the next.
        kept = output.clone()
        network(x + 1)
        assert torch.equal(output, kept)


def test_follows_new_weights_and_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = shallow(), image("STUNet 2D", batch=1)
    first = {key: value.clone() for key, value in network.state_dict().items()}
    second = {key: value * 1.1 for key, value in first.items()}
    with torch.inference_mode():
        for weights in (first, second, first):
            network.load_state_dict(weights)
            torch.testing.assert_close(network(x), plain(network, x), rtol=1e-4, atol=1e-4)
    assert len(list((tmp_path / "engine").iterdir())) == 2
    assert len(cpu_engine._compiled) == 2
    # Another process: nothing is converted again.
    cpu_engine._compiled.clear()
    monkeypatch.setattr("openvino.convert_model", None)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(network, x), rtol=1e-4, atol=1e-4)
    assert cpu_engine.precision_in_use() == "float32"


def test_half_precision_where_labels_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUNET_CPU_PRECISION", "auto")
    monkeypatch.setattr(cpu_engine, "has_bfloat16", lambda: True)
    network, x = shallow(), image("STUNet 2D", batch=1)
    with torch.inference_mode():
        network(x)
        agreed = (network(x).argmax(1) == plain(network, x).argmax(1)).float().mean()
        assert cpu_engine.precision_in_use() == "bfloat16"
        assert agreed >= cpu_engine.LEAST_AGREEMENT
        # Another network, whose labels never agree; that is not tried twice.
        monkeypatch.setattr(cpu_engine, "LEAST_AGREEMENT", 1.1)
        network.load_state_dict({k: v * 1.1 for k, v in network.state_dict().items()})
        network(x)
        assert cpu_engine.precision_in_use() == "float32"
        assert "OpenVINO in bfloat16 gives other labels" in capsys.readouterr().out
        cpu_engine._compiled.clear()
        monkeypatch.setattr("openvino.convert_model", None)
        torch.testing.assert_close(network(x), plain(network, x), rtol=1e-4, atol=1e-4)
        assert cpu_engine.precision_in_use() == "float32"


def test_nothing_is_sent_nor_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's converter would send statistics."""
    home = tmp_path / "user"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("CI", raising=False)
    sent: list[str] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, *_, **__: sent.append(request))
    network, x = shallow(), image("STUNet 2D", batch=1)
    with torch.inference_mode():
        network(x)
    assert cpu_engine.precision_in_use() == "float32"
    assert list(home.iterdir()) == []
    assert sent == []


def test_small_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine, "KEPT_BYTES", 1)
    x, folder = image("STUNet 2D", batch=1), tmp_path / "engine"

    def bytes_after_another() -> int:
        network = shallow()
        network.load_state_dict({k: v + torch.rand(1) for k, v in network.state_dict().items()})
        with torch.inference_mode():
            network(x)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    room = bytes_after_another() * 3 // 2
    monkeypatch.setattr(cpu_engine, "DISK_BYTES", room)
    assert 0 < bytes_after_another() <= room
    assert len(list(folder.iterdir())) == 1
    assert len(cpu_engine._compiled) == 1


def test_torch_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    network, x = shallow(), image("STUNet 2D", batch=1)
    applies = cpu_engine.applies
    assert not applies(network, x)  # gradients
    with torch.no_grad():
        assert applies(network, x)
        assert not applies(network, x.double())
        assert not applies(network, x.to("meta"))
        assert not applies(network.train(), x)
        network.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not applies(network, x)
        network.decoder.deep_supervision = True
        assert not applies(network, x)
        network.decoder.deep_supervision = False
        monkeypatch.setattr(cpu_engine, "LARGEST_ERROR", 0)
        torch.testing.assert_close(network(x), plain(network, x))
        assert "is not used" in capsys.readouterr().out
        monkeypatch.setattr("openvino.convert_model", None)
        network.load_state_dict({k: v * 1.1 for k, v in network.state_dict().items()})
        torch.testing.assert_close(network(x), plain(network, x))
        assert "does not take STUNet" in capsys.readouterr().out
        hook = network.decoder.seg_layers[0].register_forward_pre_hook(lambda *_: None)
        assert not applies(network, x)
        hook.remove()
        monkeypatch.setattr(cpu_engine, "_why_missing", lambda: "no such file")
        with pytest.raises(PluginError, match="pip install openvino"):
            network(x)
        monkeypatch.setenv("STUNET_CPU", "auto")
        assert cpu_engine.engine() == "torch"
