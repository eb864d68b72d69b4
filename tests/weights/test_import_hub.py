"""Checkpoints from the Hugging Face hub, against a local stand-in of the client."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stunet_plugin.commands.import_ import Import
from stunet_plugin.errors import PluginError
from stunet_plugin.weights import import_model as import_command
from stunet_plugin.weights.import_model import import_checkpoint

from import_helpers import refuse, stunet_import, write_v1


class LocalHub:
    """Serves files of a folder as huggingface_hub serves those of a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.asked.append((repo_id, filename, revision))
        if not (self.folder / filename).is_file():
            raise FileNotFoundError(f"404: {filename}")
        return str(self.folder / filename)


@pytest.mark.parametrize("pickled", [True, False])
def test_hub_files_are_imported(
    pickled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_v1(tmp_path / "hub" / "weights" / "tiny.model", plans=None if pickled else {})
    hub, source = LocalHub(tmp_path / "hub"), "hf://someone/STU-Net@v1.0/weights/tiny.model"
    plan = {} if pickled else {"spacing": (1.5,) * 3, "patch_size": (32, 32, 64)}
    strides = {} if pickled else {"strides": ("2,2,2",) * 4 + ("1,1,2",)}
    options = Import(source, out=str(tmp_path / "model"), **plan, **strides)
    assert import_command.run_import(options, hub) == 0
    assert hub.asked == [
        ("someone/STU-Net", f"weights/tiny.model{ending}", "v1.0") for ending in ("", ".pkl")
    ]
    assert json.loads((tmp_path / "model" / "provenance.json").read_text())["source"] == source
    assert ("No tiny.model.pkl beside it" in capsys.readouterr().out) is not pickled


def test_hub_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PluginError, match=r"could not be downloaded \(FileNotFoundError: 404"):
        import_checkpoint(
            Import("hf://someone/STU-Net/none.model", out=str(tmp_path / "model")),
            LocalHub(tmp_path),
        )
    for wrong in ("hf://someone", "hf://someone/STU-Net", "hf://someone/STU-Net/../x.model"):
        assert "Expected hf://owner/repository/file" in refuse(
            capsys, wrong, tmp_path / "out" / "model"
        )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refuse(
        capsys, "hf://someone/STU-Net/x.model", tmp_path / "out" / "model"
    )


def test_hub_client_is_called_as_it_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect = pytest.importorskip("inspect")
    client = pytest.importorskip("huggingface_hub", reason="the hub client is optional")
    signature = inspect.signature(client.hf_hub_download)
    signature.bind(repo_id="a/b", filename="c", revision=None)
    source = write_v1(tmp_path / "hub" / "tiny.model")
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        SimpleNamespace(hf_hub_download=LocalHub(source.parent).hf_hub_download),
    )
    assert stunet_import("hf://someone/STU-Net/tiny.model", "--out", tmp_path / "model") == 0
