"""`stunet share`: what is written and uploaded, and that it comes back as the same model."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stunet_plugin.inference.predictor import Model
from stunet_plugin.segmentation.models import find_model
from stunet_plugin.weights.locate import SHARED
from stunet_plugin.weights.safe_loading import load_checkpoint

from conftest import Stunet
from damage import damaged_files
from dataset_helpers import write_dataset

EARLIER = Path(__file__).parents[1] / "data" / "earlier_models"
TRAINED = EARLIER / "STUNetTrainer__EarlierPlans__3d_fullres"
CC = ("--licence", "CC-BY-4.0")
HUB = '''"""A stand-in for huggingface_hub: repositories are folders."""
import os, pathlib, shutil
FOLDER = pathlib.Path(os.environ["HUB_FOLDER"])
class HfApi:
    def create_repo(self, repository, private, exist_ok):
        if repository.startswith("other/"):
            raise PermissionError("403 Forbidden")
        (FOLDER / repository).mkdir(parents=True, exist_ok=True)
        (FOLDER / repository / ".private").write_text(str(private))
    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, FOLDER / repo_id, dirs_exist_ok=True)
def list_repo_files(repo_id, revision=None):
    root = FOLDER / repo_id
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
def hf_hub_download(repo_id, filename, revision=None, **_):
    if not (FOLDER / repo_id / filename).is_file():
        raise FileNotFoundError(f"404: {filename}")
    return str(FOLDER / repo_id / filename)
'''


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A trained model of two folds with a validation."""
    folder = tmp_path / "results" / "STUNetTrainer__EarlierPlans__3d_fullres"
    shutil.copytree(TRAINED, folder)
    shutil.copytree(folder / "fold_0", folder / "fold_1")
    file = folder / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for tensor in checkpoint["network_weights"].values():
        tensor.mul_(1.01)
    checkpoint["optimizer_state"] = {"state": {0: torch.zeros(100_000)}}
    torch.save(checkpoint, file)
    dice = [
        {"metrics": {"1": {"Dice": x}}, "prediction_file": "/secret/p.nii.gz"} for x in (0.5, 0.7)
    ]
    (folder / "fold_0" / "validation").mkdir(exist_ok=True)
    summary = {"metric_per_case": [*dice, {"metrics": {"1": {"Dice": float("nan")}}}]}
    (folder / "fold_0" / "validation" / "summary.json").write_text(json.dumps(summary))
    description = json.loads((folder / "dataset.json").read_text())
    listed = {"case": {"images": ["/secret/a.nii.gz"], "label": "/secret/b.nii.gz"}}
    (folder / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, site = tmp_path / "hub", tmp_path / "site"
    site.mkdir()
    (site / "huggingface_hub.py").write_text(HUB)
    monkeypatch.setenv("HUB_FOLDER", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", (site / "huggingface_hub.py").as_uri())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *map(str, sys.path)]))
    monkeypatch.setenv("STUNET_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    return folder


def logits(folder: Path, fold: str) -> torch.Tensor:
    """Of a preprocessed image: the plan has to be the same, too."""
    model = Model(folder, (fold,))
    predictor = model.predictor
    rng = np.random.default_rng(3)
    image = rng.normal(100, 200, (model.channels, 20, 24, 22)).astype(np.float32)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, *_ = preprocessor.run_case_npy(
        image,
        None,
        {"spacing": [2.0, 1.5, 1.0]},
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))


def test_a_shared_model_is_the_same_model(trained: Path, stunet: Stunet) -> None:
    shared, again = stunet.folder / "shared", stunet.folder / "again"
    said = stunet("share", trained, "--out", shared, *CC)
    assert f"stunet segment SCAN -o OUT -m {shared}" in said
    stunet("import", shared, "--out", again)
    for fold in ("0", "1"):
        expected = logits(trained, fold)
        assert torch.equal(logits(again, fold), expected)
        assert expected.std() > 0
    # Files: no code, no optimizer, no path of a training case.
    names = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    weights = {f"fold_0/{SHARED}", f"fold_1/{SHARED}"}
    assert names == {*weights, "plans.json", "dataset.json", "README.md", "picture.png"}
    assert not any(b"secret" in (shared / name).read_bytes() for name in names)
    tensors = load_checkpoint(shared / "fold_1" / SHARED)["network_weights"]
    size = 2 * sum(x.numel() * x.element_size() for x in tensors.values())
    assert (shared / "fold_0" / SHARED).stat().st_mode & 0o044
    weighed = sum((shared / name).stat().st_size for name in weights)
    # The header and the other files do not grow with the network.
    assert weighed < 1.05 * size or weighed - size < 100_000
    card = (shared / "README.md").read_text()
    labels = json.loads((trained / "dataset.json").read_text())["labels"]
    first = next(name for name, value in labels.items() if value == 1)
    for words in (
        "license: cc-by-4.0",
        f"| {first} | 2 | 0.600 |",
        "STUNetTrainer",
        "folds fold_0",
    ):
        assert words in card


def test_segment_takes_a_shared_folder(trained: Path, hub: Path, stunet: Stunet) -> None:
    shared = stunet.folder / "shared"
    stunet("share", trained, "--out", shared, *CC, "-f", 1)
    folder = find_model(str(shared))
    assert sorted(path.name for path in folder.glob("fold_*")) == ["fold_1"]
    assert find_model(str(shared)) == folder
    write_dataset(hub.parent / "raw" / "Dataset007_Mine", {"background": 0, "a": 1}, 5)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        stunet.patch.setenv(name, str(hub.parent / "raw"))
    message = stunet.refuse("fine-tune", shared, "-d 7 --device cpu")
    assert "is a shared model, which nnU-Net does not read. Run: stunet import" in message


def test_a_model_goes_to_the_hub_and_comes_back(trained: Path, hub: Path, stunet: Stunet) -> None:
    said = stunet("share", trained, "--out", "hf://me/liver", *CC, "--citation", "Me2026")
    assert "-m hf://me/liver" in said
    assert (hub / "me/liver/.private").read_text() == "True"
    card = (hub / "me/liver/README.md").read_text()
    assert "Me2026" in card
    assert "stunet import hf://me/liver" in card
    folder = stunet.folder / "again"
    stunet("import", "hf://me/liver", "--out", folder)
    assert torch.equal(logits(folder, "1"), logits(trained, "1"))
    message = stunet.refuse("share", trained, "--out", "hf://other/liver", *CC)
    assert "could not be uploaded" in message
    assert "403 Forbidden" in message
    (hub / "me/empty").mkdir()
    assert "is no shared model" in stunet.refuse_import("hf://me/empty")


WRONG = {
    "{folder} --licence my_own --out {out}": "names no licence as the hub does",
    "{none} --licence mit --out {out}": "is no trained model of nnU-Net: plans.json is not there",
    "{folder} --licence mit --out {out} -f 3": "fold_3/checkpoint_final.pth is not there",
    "{folder} --licence mit --out {folder}": "is there already. Give --out a new folder",
    "{folder} --licence mit --out hf://liver": "names no repository. Expected hf://owner/name",
    "{folder} --licence mit --out {out} --picture {folder}/plans.json": "is no PNG file",
}


def test_wrong_input_is_refused(trained: Path, stunet: Stunet) -> None:
    places = {"folder": trained, "none": stunet.folder / "none", "out": stunet.folder / "out"}
    for words, message in WRONG.items():
        assert message in stunet.refuse(f"share {words.format(**places)}"), words


def test_damaged_and_foreign_safetensors_are_refused(trained: Path, stunet: Stunet) -> None:
    stunet("share", trained, "--out", stunet.folder / "shared", *CC, "-f", 0)
    file = stunet.folder / "shared" / "fold_0" / SHARED
    for kind, content in damaged_files(file, 40):
        if kind == "header":
            continue  # it may still be right
        file.write_bytes(content)
        assert str(file) in stunet.refuse_import(file.parent.parent)
    for header in ({}, {"__metadata__": {"stunet": "[1]"}}, {"__metadata__": {"stunet": "{"}}):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        assert str(file) in stunet.refuse_import(file.parent.parent)
