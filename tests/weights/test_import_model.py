"""``stunet import``: what is written, where, all or nothing; files of the Hugging Face hub; and
``stunet inspect``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.utilities.file_path_utilities import get_output_folder

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import get_preset
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.weights import locate

import import_helpers as helpers
from conftest import Stunet

LABELS = "--labels background liver spleen aorta colon"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_model_folder_is_complete(stunet: Stunet, tiny: Path) -> None:
    out = stunet.model(tiny, LABELS)
    plans, dataset, record = (
        helpers.read(out, name) for name in ("plans", "dataset", "provenance")
    )
    expected = {
        "architecture": stunet_architecture(get_preset("tiny"), helpers.STRIDES),
        "spacing": [1.5] * 3,
        "patch_size": [32, 32, 64],
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    assert {key: helpers.configuration(out)[key] for key in expected} == expected
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["plans_name"] == "nnUNetPlans"
    assert dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "colon": 4}
    assert (dataset["channel_names"], dataset["file_ending"]) == ({"0": "nonCT"}, ".nii.gz")
    assert record["sha256"] == sha256_of(tiny)
    assert record["plans_pickle_sha256"] == sha256_of(tiny.with_name("tiny.model.pkl"))
    assert record["source"] == str(tiny)
    assert record["format"] == "nnU-Net v1 checkpoint of the published STU-Net"
    assert {"stunet-plugin", "nnunetv2", "torch", "numpy", "python"} == set(record["versions"])
    written = {str(path.relative_to(out)) for path in contents(out)}
    assert {*record["files"], "provenance.json"} == written

    checkpoint = helpers.checkpoint_in(out)
    assert {"trainer_name", "inference_allowed_mirroring_axes"} <= set(checkpoint)
    assert checkpoint["optimizer_state"] is None
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset}
    assert checkpoint["init_args"] == arguments
    network = helpers.make_network()
    network.load_state_dict(checkpoint["network_weights"])
    given = torch.load(tiny, weights_only=False)["state_dict"]
    assert all(
        torch.equal(x, given[name]) for name, x in helpers.published_weights(network).items()
    )


def test_nnunet_results_is_the_default_place(stunet: Stunet, tiny: Path) -> None:
    """nnU-Net finds the model by ID and trainer, exports it and installs it elsewhere."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        stunet.patch.delenv(variable, raising=False)
    assert "nnUNet_results is not set" in stunet.refuse("import", tiny)
    results, elsewhere = stunet.folder / "results", stunet.folder / "elsewhere"
    stunet.patch.setenv("nnUNet_results", str(results))
    said = stunet("import", tiny)
    assert "nnUNetv2_predict -d 101 -c 3d_fullres -tr STUNetTrainer_tiny -f 0" in said
    found = Path(get_output_folder(101, "STUNetTrainer_tiny", "nnUNetPlans", "3d_fullres"))
    assert found == results / "Dataset101_tiny" / "STUNetTrainer_tiny__nnUNetPlans__3d_fullres"
    # A second dataset of the same ID would make nnU-Net find neither.
    assert "--dataset-id" in stunet.refuse("import", tiny, "--name Other")
    stunet("import", tiny, "--name Other --dataset-id 102")

    archive = str(stunet.folder / "model.zip")
    export_pretrained_model(101, archive, ("3d_fullres",), "STUNetTrainer_tiny", folds=(0,))
    stunet.patch.setenv("nnUNet_results", str(elsewhere))
    install_model_from_zip_file(archive)
    installed = elsewhere / found.relative_to(results)
    assert helpers.read(installed) == helpers.read(found)
    assert (
        helpers.checkpoint_of(installed).read_bytes() == helpers.checkpoint_of(found).read_bytes()
    )


def test_importing_twice_changes_nothing_without_force(stunet: Stunet, tiny: Path) -> None:
    out = stunet.model(tiny)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    # The same again is no error: scripts run more than once. From another place, too.
    elsewhere = stunet.folder / "moved" / tiny.name
    shutil.copytree(tiny.parent, elsewhere.parent)
    for source in (tiny, elsewhere):
        said = stunet("import", source, "--out", out)
        assert f"Already there: {out} holds this very import. Nothing was written." in said
        assert "Predict:" in said
    message = stunet.refuse("import", tiny, "--out", out, LABELS)
    assert all(words in message for words in ("is there already", str(tiny), sha256_of(tiny)))
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    assert after == before
    helpers.checkpoint_of(out).write_bytes(b"damaged")
    assert "is there already" in stunet.refuse("import", tiny, "--out", out)
    stunet("import", tiny, "--out", out, LABELS, "--force")
    assert "liver" in helpers.read(out, "dataset")["labels"]
    assert os.listdir(out.parent) == [out.name]


def test_force_never_takes_what_no_import_wrote(stunet: Stunet, tiny: Path) -> None:
    out = stunet.model(tiny)
    trained = out / "fold_1" / "checkpoint_best.pth"
    trained.parent.mkdir()
    trained.write_text("a week of training")
    again = ("import", tiny, "--out", out, "--force")
    assert "fold_1/checkpoint_best.pth" in stunet.refuse(*again)
    (out / "provenance.json").write_text("{")
    assert "is damaged" in stunet.refuse(*again)
    (out / "provenance.json").unlink()
    assert "no `stunet import` wrote it" in stunet.refuse(*again)


@pytest.mark.parametrize("replacing", [True, False])
@pytest.mark.parametrize(
    ("module", "function", "failing", "error"),
    [
        (torch, "save", 1, OSError(28, "No space left on device")),
        (torch, "save", 1, RuntimeError("PytorchStreamWriter failed writing file")),
        (torch, "save", 1, KeyboardInterrupt()),
        (os, "rename", 1, OSError(5, "Input/output error")),
        (os, "rename", 2, OSError(5, "Input/output error")),
    ],
)
def test_a_crash_leaves_everything_as_it_was(
    module: Any,
    function: str,
    failing: int,
    error: BaseException,
    replacing: bool,
    stunet: Stunet,
    tiny: Path,
) -> None:
    out, whole, calls = stunet.folder / "new" / "deep" / "model", getattr(module, function), []
    if replacing:
        stunet("import", tiny, "--out", out)
    before = contents(stunet.folder)

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        return whole(*arguments)

    stunet.patch.setattr(module, function, fail_once)
    if failing == 1 or replacing:
        full = "No space" in str(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1 if full else 2
        assert stunet("import", tiny, "--out", out, "--force", code=code)
        assert contents(stunet.folder) == before
        assert sorted(os.listdir(stunet.folder)) == ["new", "source"] if replacing else ["source"]


@pytest.mark.parametrize(("kind", "legacy"), [(torch.float16, True), (torch.float64, False)])
def test_other_number_formats_become_float32(
    stunet: Stunet, tiny: Path, kind: torch.dtype, legacy: bool
) -> None:
    weights = {
        name: value.to(kind)
        for name, value in helpers.published_weights(helpers.make_network()).items()
    }
    # A view of a larger tensor: only its own values may be written.
    wide = torch.zeros(2, *weights["seg_outputs.0.weight"].shape, dtype=kind)
    weights["seg_outputs.0.weight"] = wide[1]
    torch.save(helpers.v1_checkpoint(weights), tiny, _use_new_zipfile_serialization=not legacy)
    written = helpers.checkpoint_in(stunet.model(tiny))["network_weights"]
    assert {value.dtype for value in written.values()} == {torch.float32}
    stem = written["encoder.stages.0.0.conv1.weight"]
    assert torch.equal(stem, weights["conv_blocks_context.0.0.conv1.weight"].float())
    assert written["decoder.seg_layers.0.weight"].untyped_storage().nbytes() == wide[1].numel() * 4


@pytest.mark.parametrize(
    ("prefix", "lightning"), [("module.", False), ("_orig_mod.module.", False), ("net.", True)]
)
def test_prefixes_of_wrappers_are_stripped_and_said(
    stunet: Stunet, tiny: Path, tmp_path: Path, prefix: str, lightning: bool
) -> None:
    plain = stunet.model(tiny)
    content = torch.load(tiny, weights_only=False)
    content["state_dict"] = {prefix + name: x for name, x in content["state_dict"].items()}
    torch.save(content | ({"pytorch-lightning_version": "2.4"} if lightning else {}), tiny)
    said = stunet("import", tiny, "--out", tmp_path / "wrapped")
    assert f"{prefix!r} stripped" in said
    assert ("Lightning" in said) == lightning
    one, two = (helpers.checkpoint_in(x)["network_weights"] for x in (plain, tmp_path / "wrapped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_own_checkpoints_are_imported_with_their_plan_and_labels(
    stunet: Stunet, tiny: Path, tmp_path: Path
) -> None:
    first = stunet.model(tiny, LABELS)
    content = helpers.checkpoint_in(first) | {"inference_allowed_mirroring_axes": (0, 2)}
    torch.save(content, tmp_path / "own.pth")
    second = stunet.model(tmp_path / "own.pth")
    for name in ("plans", "dataset"):
        one, two = helpers.read(first, name), helpers.read(second, name)
        # What names the dataset and its source differs.
        naming = {"dataset_name", "name", "description"}
        assert {key for key in one if one[key] != two[key]} <= naming
    written = helpers.checkpoint_in(second)
    assert written["inference_allowed_mirroring_axes"] == (0, 2)
    given = content["network_weights"]
    assert all(torch.equal(x, given[name]) for name, x in written["network_weights"].items())


def test_inspect_says_what_is_known_and_reads_no_weights(stunet: Stunet, tiny: Path) -> None:
    weights = helpers.published_weights(helpers.make_network())
    # Weights that an import would refuse show that nothing looks at them.
    weights["seg_outputs.0.bias"].fill_(float("nan"))
    said = stunet("inspect", helpers.write_v1(tiny, weights))
    for words in (
        "torch file (zip format)",
        "nnU-Net v1 checkpoint of the published STU-Net",
        "STU-Net tiny (widths [4, 8, 16, 32, 64, 64]",
        "1 input channel(s), 5 outputs",
        "spacing 1.5 x 1.5 x 1.5 mm, patch 32 x 32 x 64",
        "5: background, class_1",
        "4000",
    ):
        assert words in said
    pickled = tiny.with_name("tiny.model.pkl")
    assert "plans of nnU-Net v1" in stunet("inspect", pickled)
    pickled.unlink()
    assert "unknown" in stunet("inspect", tiny)


def test_inspect_shows_the_provenance_of_a_folder(stunet: Stunet, tiny: Path) -> None:
    model = stunet.model(tiny, "--labels background a b c d")
    said = stunet("inspect", model)
    assert said == stunet("inspect", model / "fold_0")
    assert "5: background, a, b, c, d" in said
    assert f"from {tiny} by stunet-plugin" in said
    assert "no model folder" in stunet.refuse("inspect", stunet.folder)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """What is asked of a stand-in for huggingface_hub, which serves the files of a folder."""
    asked = []

    def download(repo_id: str, filename: str, revision: str | None, **_: bool) -> str:
        asked.append((repo_id, filename, revision))
        if not (tmp_path / "hub" / filename).is_file():
            raise FileNotFoundError(f"404: {filename}")
        return str(tmp_path / "hub" / filename)

    hub = SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(locate, "is_reachable", lambda address: True)
    return asked


@pytest.mark.parametrize("pickled", [True, False])
def test_hub_files_are_imported(
    stunet: Stunet, tmp_path: Path, asked: list[tuple[str, str, str | None]], pickled: bool
) -> None:
    helpers.write_v1(tmp_path / "hub" / "weights" / "tiny.model", plans=None if pickled else {})
    source = "hf://someone/STU-Net@v1.0/weights/tiny.model"
    plan = "--spacing 2 2 2 --patch-size 32 32 64 --strides 2,2,2 2,2,2 2,2,2 2,2,2 1,1,2"
    said = stunet("import", source, "--out", tmp_path / "model", "" if pickled else plan)
    files = ("weights/tiny.model", "weights/tiny.model.pkl")
    assert asked == [("someone/STU-Net", file, "v1.0") for file in files]
    assert helpers.read(tmp_path / "model", "provenance")["source"] == source
    assert ("No tiny.model.pkl beside it" in said) is not pickled


def test_hub_errors_say_what_to_do(stunet: Stunet, asked: list[object]) -> None:
    message = stunet.refuse("import hf://someone/STU-Net/none.model")
    assert "FileNotFoundError: 404" in message
    for wrong in ("hf://someone", "hf://someone/STU-Net", "hf://someone/STU-Net/../x.model"):
        assert "hf://owner/repository/file" in stunet.refuse("import", wrong)
    web, ours = "https://huggingface.co", "stunet import hf:/"
    for address, advice in (
        (f"{web}/a/STU-Net/resolve/main/b.model?download=true", f"{ours}/a/STU-Net/b.model"),
        (f"{web}/a/b/blob/v1/c/d.pth", f"{ours}/a/b@v1/c/d.pth"),
        ("https://example.org/x.model", "download the file"),
    ):
        assert advice in stunet.refuse("import", address)
    # Without a network only the client's cache is asked, and at once.
    stunet.patch.setattr(locate, "is_reachable", lambda address: False)
    assert "does not answer" in stunet.refuse("import hf://someone/STU-Net/none.model")
    stunet.patch.setitem(sys.modules, "huggingface_hub", None)
    message = stunet.refuse("import hf://someone/STU-Net/x.model")
    assert "pip install huggingface_hub" in message
