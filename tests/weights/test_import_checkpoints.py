"""``stunet import``: what is written, where, and that it is all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.utilities.file_path_utilities import get_output_folder

from stunet_plugin.commands.import_ import Import
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.weights import model_folder
from stunet_plugin.weights.import_model import import_checkpoint

from import_helpers import (
    checkpoint_in,
    make_network,
    published_weights,
    refuse,
    stunet_import,
    v1_checkpoint,
    write_v1,
)

LOADER_KEYS = {"network_weights", "init_args", "trainer_name", "inference_allowed_mirroring_axes"}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A v1 checkpoint of random weights with its .pkl."""
    return write_v1(tmp_path / "source" / "tiny.model")


def test_model_folder_is_complete(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert (
        stunet_import(
            tiny, "--out", out, "--labels", "background", "liver", "spleen", "aorta", "colon"
        )
        == 0
    )
    plans, dataset, provenance = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("plans", "dataset", "provenance")
    )
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"] == stunet_architecture(
        get_preset("tiny"), [[1, 1, 1]] + [[2, 2, 2]] * 4 + [[1, 1, 2]]
    )
    assert (configuration["spacing"], configuration["patch_size"], configuration["batch_size"]) == (
        [1.5] * 3,
        [32, 32, 64],
        2,
    )
    assert (configuration["normalization_schemes"], configuration["use_mask_for_norm"]) == (
        ["ZScoreNormalization"],
        [False],
    )
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["plans_name"] == "nnUNetPlans"
    assert dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "colon": 4}
    assert (dataset["channel_names"], dataset["file_ending"]) == ({"0": "nonCT"}, ".nii.gz")
    assert provenance["sha256"] == sha256_of(tiny)
    assert provenance["plans_pickle_sha256"] == sha256_of(tiny.with_name("tiny.model.pkl"))
    assert (provenance["source"], provenance["format"]) == (
        str(tiny),
        "nnU-Net v1 checkpoint of the published STU-Net",
    )
    assert {"stunet-plugin", "nnunetv2", "torch", "numpy", "python"} == set(provenance["versions"])
    assert sorted(provenance["files"]) == sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.name != "provenance.json"
    )

    checkpoint = checkpoint_in(out)
    assert set(checkpoint) >= LOADER_KEYS
    assert checkpoint["optimizer_state"] is None
    assert checkpoint["init_args"] == {
        "plans": plans,
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": dataset,
    }
    weights = torch.load(tiny, weights_only=False)["state_dict"]
    network = make_network()
    network.load_state_dict(checkpoint["network_weights"])
    assert all(
        torch.equal(value, weights[name]) for name, value in published_weights(network).items()
    )


def test_nnunet_results_is_the_default_place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net finds the model by ID, trainer and the default plans' name, exports it and installs
    it elsewhere."""
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert stunet_import(tiny) == 2
    assert "nnUNet_results is not set" in capsys.readouterr().err
    monkeypatch.setenv("nnUNet_results", str(results))
    assert stunet_import(tiny) == 0
    assert (
        "nnUNetv2_predict -d 101 -c 3d_fullres -tr STUNetTrainer_tiny -f 0"
        in capsys.readouterr().out
    )
    found = Path(get_output_folder(101, "STUNetTrainer_tiny", "nnUNetPlans", "3d_fullres"))
    assert found == results / "Dataset101_tiny" / "STUNetTrainer_tiny__nnUNetPlans__3d_fullres"
    assert (found / "fold_0" / "checkpoint_final.pth").is_file()

    # A second dataset of the same ID would make nnU-Net find neither.
    assert stunet_import(tiny, "--name", "Other") == 2
    assert "choose another --dataset-id" in capsys.readouterr().err.lower()
    assert stunet_import(tiny, "--name", "Other", "--dataset-id", "102") == 0

    archive = tmp_path / "model.zip"
    export_pretrained_model(101, str(archive), ("3d_fullres",), "STUNetTrainer_tiny", folds=(0,))
    monkeypatch.setenv("nnUNet_results", str(elsewhere))
    install_model_from_zip_file(str(archive))
    installed = elsewhere / found.relative_to(results)
    assert (installed / "plans.json").read_text() == (found / "plans.json").read_text()
    assert sha256_of(installed / "fold_0" / "checkpoint_final.pth") == sha256_of(
        found / "fold_0" / "checkpoint_final.pth"
    )


def test_importing_twice_changes_nothing_without_force(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models" / "model"
    assert stunet_import(tiny, "--out", out) == 0
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    # The same again is no error: scripts run more than once. From another place, too.
    elsewhere = tmp_path / "moved" / tiny.name
    shutil.copytree(tiny.parent, elsewhere.parent)
    for source in (tiny, elsewhere):
        capsys.readouterr()
        assert stunet_import(source, "--out", out) == 0
        said = capsys.readouterr().out
        assert f"Already there: {out} holds this very import. Nothing was written." in said
        assert "Predict:" in said
    # Anything else is.
    message = refuse(capsys, tiny, out, "--labels", "background", "a", "b", "c", "d")
    assert "is there already" in message
    assert str(tiny) in message
    assert sha256_of(tiny) in message
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")
    } == before
    (out / "fold_0" / "checkpoint_final.pth").write_bytes(b"damaged")
    assert "is there already" in refuse(capsys, tiny, out)
    assert (
        stunet_import(tiny, "--out", out, "--force", "--labels", "background", "a", "b", "c", "d")
        == 0
    )
    assert "a" in json.loads((out / "dataset.json").read_text())["labels"]
    assert os.listdir(out.parent) == ["model"]


def test_force_never_takes_what_no_import_wrote(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models" / "model"
    assert stunet_import(tiny, "--out", out) == 0
    trained = out / "fold_1" / "checkpoint_best.pth"
    trained.parent.mkdir()
    trained.write_text("a week of training")
    assert "files that no import wrote (for example fold_1/checkpoint_best.pth)" in refuse(
        capsys, tiny, out, "--force"
    )
    (out / "provenance.json").unlink()
    assert "no `stunet import` wrote it" in refuse(capsys, tiny, out, "--force")
    assert trained.read_text() == "a week of training"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("crash")]
)
def test_crash_while_writing_leaves_nothing(
    error: BaseException, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, path: Path) -> None:
        path.write_text("half a file")
        raise error

    monkeypatch.setattr(model_folder, "_save", fail)
    expected = PluginError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        import_checkpoint(Import(str(tiny), out=str(tmp_path / "new" / "deep" / "model")))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("failing", [1, 2])
def test_crash_while_replacing_keeps_the_old_folder(
    failing: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models" / "model"
    options = Import(str(tiny), out=str(out), force=True)
    import_checkpoint(options)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    calls: list[Path] = []
    rename = os.rename

    def fail_once(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(model_folder.os, "rename", fail_once)
    with pytest.raises(PluginError, match="Input/output error"):
        import_checkpoint(options)
    assert {
        path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()
    } == before
    assert os.listdir(out.parent) == ["model"]


def test_what_a_killed_import_left_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / f"{model_folder.TEMPORARY_PREFIX}abc"
    left.mkdir()
    assert stunet_import(tiny, "--out", tmp_path / "model") == 0
    assert str(left) in capsys.readouterr().out
    assert left.is_dir()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_other_number_formats_become_float32(
    kind: torch.dtype, legacy: bool, tmp_path: Path
) -> None:
    weights = {name: value.to(kind) for name, value in published_weights(make_network()).items()}
    # A view of a larger tensor: only its own values may be written.
    wide = torch.zeros(2, *weights["seg_outputs.0.weight"].shape, dtype=kind)
    weights["seg_outputs.0.weight"] = wide[1]
    path = tmp_path / "source" / "x.model"
    write_v1(path)
    torch.save(v1_checkpoint(weights), path, _use_new_zipfile_serialization=not legacy)
    import_checkpoint(Import(str(path), out=str(tmp_path / "model")))
    written = checkpoint_in(tmp_path / "model")["network_weights"]
    assert {value.dtype for value in written.values()} == {torch.float32}
    stem = written["encoder.stages.0.0.conv1.weight"]
    assert torch.equal(stem, weights["conv_blocks_context.0.0.conv1.weight"].float())
    assert written["decoder.seg_layers.0.weight"].untyped_storage().nbytes() == wide[1].numel() * 4


def test_own_checkpoints_are_imported_with_their_plan_and_labels(
    tiny: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert stunet_import(tiny, "--out", first, "--labels", "background", "a", "b", "c", "d") == 0
    content = checkpoint_in(first)
    content["inference_allowed_mirroring_axes"] = (0, 2)
    torch.save(content, tmp_path / "own.pth")
    assert stunet_import(tmp_path / "own.pth", "--out", second) == 0
    for name in ("plans.json", "dataset.json"):
        one, two = (json.loads((folder / name).read_text()) for folder in (first, second))
        # What names the dataset and its source differs.
        assert {key for key in one if one[key] != two[key]} <= {
            "dataset_name",
            "name",
            "description",
        }
    written = checkpoint_in(second)
    assert written["inference_allowed_mirroring_axes"] == (0, 2)
    assert all(
        torch.equal(value, content["network_weights"][name])
        for name, value in written["network_weights"].items()
    )
