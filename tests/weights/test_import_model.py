"""``stunet import``: what is written, where, all or nothing; files of the Hugging Face hub; and
``stunet inspect``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.utilities.file_path_utilities import get_output_folder

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.weights import locate

import import_helpers as helpers
from conftest import Stunet

LABELS = "--labels background liver spleen aorta colon"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[x], other[x]) for x in one)


def test_model_folder_is_complete(stunet: Stunet, tiny: Path) -> None:
    out = stunet.model(tiny, LABELS)
    plans, dataset, record = (
        helpers.read(out, name) for name in ("plans", "dataset", "provenance")
    )
    expected = {
        "architecture": stunet_architecture(PRESETS["tiny"], helpers.STRIDES),
        "spacing": [1.5] * 3,
        "patch_size": [32, 32, 64],
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    assert {key: helpers.configuration(out)[key] for key in expected} == expected
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "colon": 4}
    assert (dataset["channel_names"], dataset["file_ending"]) == ({"0": "nonCT"}, ".nii.gz")
    assert record["sha256"] == sha256_of(tiny)
    assert record["plans_pickle_sha256"] == sha256_of(tiny.with_name("tiny.model.pkl"))
    assert {"stunet-plugin", "nnunetv2", "torch", "numpy", "python"} == set(record["versions"])
    assert {*record["files"], "provenance.json"} == set(contents(out))

    checkpoint = helpers.checkpoint_in(out)
    assert checkpoint["optimizer_state"] is None
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset}
    assert checkpoint["init_args"] == arguments
    network = helpers.make_network()
    network.load_state_dict(checkpoint["network_weights"])
    given = torch.load(tiny, weights_only=False)["state_dict"]
    assert same_weights(helpers.published_weights(network), given)

    said = stunet("inspect", out)
    facts = json.loads(stunet("inspect", out, "--json"))
    assert said.splitlines() == [f"{name + ':':<13}{text}" for name, text in facts.items()]
    assert "5: background, liver, spleen, aorta, colon" in said
    assert f"from {tiny} by stunet-plugin" in said


def test_nnunet_results_is_the_default_place(stunet: Stunet, tiny: Path) -> None:
    """nnU-Net finds the model by ID and trainer, and exports it."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        stunet.patch.delenv(variable, raising=False)
    assert "nnUNet_results is not set" in stunet.refuse("import", tiny)
    results = stunet.folder / "results"
    stunet.patch.setenv("nnUNet_results", str(results))
    said = stunet("import", tiny)
    assert "nnUNetv2_predict -d 101 -c 3d_fullres -tr STUNetTrainer_tiny -f 0" in said
    found = Path(get_output_folder(101, "STUNetTrainer_tiny", "nnUNetPlans", "3d_fullres"))
    assert found == results / "Dataset101_tiny" / "STUNetTrainer_tiny__nnUNetPlans__3d_fullres"
    # A second dataset of the same ID would make nnU-Net find neither.
    assert "--dataset-id" in stunet.refuse("import", tiny, "--name Other")
    stunet("import", tiny, "--name Other --dataset-id 102")

    archive = stunet.folder / "model.zip"
    export_pretrained_model(101, str(archive), ("3d_fullres",), "STUNetTrainer_tiny", folds=(0,))
    assert archive.is_file()


def test_importing_twice_changes_nothing_without_force(stunet: Stunet, tiny: Path) -> None:
    out = stunet.model(tiny)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    # The same again is no error, from another place too: scripts run more than once.
    elsewhere = stunet.folder / "moved" / tiny.name
    shutil.copytree(tiny.parent, elsewhere.parent)
    said = stunet("import", elsewhere, "--out", out)
    assert f"Already there: {out} holds this very import. Nothing was written." in said
    assert "Predict:" in said
    message = stunet.refuse("import", tiny, "--out", out, LABELS)
    assert all(words in message for words in ("is there already", str(tiny), sha256_of(tiny)))
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    assert after == before
    helpers.checkpoint_of(out).write_bytes(b"damaged")
    assert "is there already" in stunet.refuse("import", tiny, "--out", out)
    again = ("import", tiny, "--out", out, LABELS, "--force")
    stunet(*again)
    assert "liver" in helpers.read(out, "dataset")["labels"]
    assert os.listdir(out.parent) == [out.name]

    # Even that never takes what no import wrote.
    trained = out / "fold_1" / "checkpoint_best.pth"
    trained.parent.mkdir()
    trained.write_text("a week of training")
    assert "fold_1/checkpoint_best.pth" in stunet.refuse(*again)
    (out / "provenance.json").unlink()
    assert "no `stunet import` wrote it" in stunet.refuse(*again)


@pytest.mark.parametrize(
    ("module", "function", "failing", "error", "code"),
    [
        (torch, "save", 1, OSError(28, "No space left on device"), 1),
        (torch, "save", 1, KeyboardInterrupt(), 130),
        (os, "rename", 2, OSError(5, "Input/output error"), 2),
    ],
)
def test_a_crash_leaves_everything_as_it_was(
    module: Any, function: str, failing: int, error: Any, code: int, stunet: Stunet, tiny: Path
) -> None:
    whole, calls = getattr(module, function), []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        return whole(*arguments)

    there = stunet.model(tiny)
    before = contents(stunet.folder)
    stunet.patch.setattr(module, function, fail_once)
    # Only where a folder is replaced are there two renamings.
    out = there if failing == 2 else stunet.folder / "new" / "model"
    assert stunet("import", tiny, "--out", out, "--force", code=code)
    assert contents(stunet.folder) == before
    assert sorted(os.listdir(stunet.folder)) == ["models", "source"]


def test_wrapped_weights_in_half_precision(stunet: Stunet, tiny: Path) -> None:
    content = torch.load(tiny, weights_only=False)
    plain = content["state_dict"]
    content["state_dict"] = {f"_orig_mod.net.{x}": plain[x].half() for x in plain}
    torch.save(content | {"pytorch-lightning_version": "2.4"}, tiny)
    said = stunet("import", tiny, "--out", out := stunet.folder / "wrapped")
    assert "'_orig_mod.net.' stripped from all names (Lightning" in said
    written = helpers.checkpoint_in(out)["network_weights"]
    assert {value.dtype for value in written.values()} == {torch.float32}
    stem = plain["conv_blocks_context.0.0.conv1.weight"].half().float()
    assert torch.equal(written["encoder.stages.0.0.conv1.weight"], stem)


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
    torch.save(content | {"inference_allowed_mirroring_axes": (0, 7)}, tmp_path / "own.pth")
    assert "mirroring" in stunet.refuse_import(tmp_path / "own.pth")


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
    ):
        assert words in said
    pickled = tiny.with_name("tiny.model.pkl")
    assert "plans of nnU-Net v1" in stunet("inspect", pickled)
    assert "no model folder" in stunet.refuse("inspect", stunet.folder)


def test_files_of_the_hub(stunet: Stunet) -> None:
    """A stand-in for huggingface_hub serves the files of a folder."""
    folder, asked = stunet.folder / "hub", []

    def download(repo_id: str, filename: str, revision: str | None, **_: bool) -> str:
        asked.append((repo_id, filename, revision))
        if not (folder / filename).is_file():
            raise FileNotFoundError(f"404: {filename}")
        return str(folder / filename)

    hub = SimpleNamespace(hf_hub_download=download)
    stunet.patch.setitem(sys.modules, "huggingface_hub", hub)
    stunet.patch.setattr(locate, "is_reachable", lambda address: True)
    helpers.write_v1(folder / "weights" / "tiny.model")
    source = "hf://someone/STU-Net@v1.0/weights/tiny.model"
    model = stunet.model(source)
    files = ("weights/tiny.model", "weights/tiny.model.pkl")
    assert asked == [("someone/STU-Net", file, "v1.0") for file in files]
    assert helpers.read(model, "provenance")["source"] == source

    web, missing = "https://huggingface.co/a/STU-Net/resolve", "hf://a/STU-Net/x.model"
    for address, message in (
        (missing, "FileNotFoundError: 404"),
        ("hf://someone", "hf://owner/repository/file"),
        ("hf://someone/STU-Net/../x.model", "hf://owner/repository/file"),
        (f"{web}/v1/b.model?download=true", "stunet import hf://a/STU-Net@v1/b.model"),
    ):
        assert message in stunet.refuse("import", address)
    # Without a network only the client's cache is asked, and at once.
    stunet.patch.setattr(locate, "is_reachable", lambda address: False)
    assert "does not answer" in stunet.refuse("import", missing)
    stunet.patch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in stunet.refuse("import", missing)
