"""Models by name: the table of published ones, download, import, cache, errors, `stunet models`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.options import Options
from stunet_plugin.segmentation.models import find_model, is_model
from stunet_plugin.segmentation.published import PublishedModel, published_models
from stunet_plugin.utils.files import home
from stunet_plugin.utils.label_systems import LabelSystem, canonical_name
from stunet_plugin.weights.locate import published_facts, web_address

import import_helpers as helpers
from conftest import Stunet

NAME = "tiny-model"
TINY = PublishedModel(
    NAME,
    "tiny",
    modality="CT",
    trained_on="noise",
    dataset_name="Tiny",
    channels=1,
    outputs=5,
    structures=("liver", "spleen", "kidney_left", "kidney_right"),
    licence="not stated",
    citation=("A. Nobody, 2026.",),
    source="hf://someone/models/tiny.model",
)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney_left": 3, "kidney_right": 4}
HUB = '''"""A stand-in for huggingface_hub, which serves the files of a folder."""
import os, pathlib, time
FOLDER = pathlib.Path(os.environ["HUB_FOLDER"])
def hf_hub_download(repo_id, filename, revision, **_):
    with (FOLDER / "asked").open("a") as file:
        file.write(f"{os.getpid()} {repo_id}/{filename}\\n")
    time.sleep(float(os.environ.get("HUB_SECONDS", 0)))
    if not (FOLDER / filename).is_file():
        raise FileNotFoundError(f"404: {filename}")
    return str(FOLDER / filename)
def list_repo_files(repo_id, revision=None):
    return sorted(path.name for path in FOLDER.iterdir())
'''
FIND = f"""
import sys
from stunet_plugin.segmentation.models import find_model
from stunet_plugin.segmentation.published import PublishedModel, published_models
published_models()[{NAME!r}] = {TINY!r}
print(find_model({NAME!r}))
assert "torch" not in sys.modules
"""

Offline = Callable[[], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, not there yet; the tiny model is among the published ones."""
    monkeypatch.setenv("STUNET_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(published_models(), NAME, TINY)
    return tmp_path / "home" / "models"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the stand-in serves, also in other processes; the tiny model is in it."""
    folder, site = tmp_path / "hub", tmp_path / "site"
    site.mkdir()
    (site / "huggingface_hub.py").write_text(HUB)
    monkeypatch.setenv("HUB_FOLDER", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", (site / "huggingface_hub.py").as_uri())  # it answers
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *map(str, sys.path)]))
    monkeypatch.syspath_prepend(str(site))
    # Set and deleted, so that the stand-in is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    helpers.write_v1(folder / "tiny.model")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Offline:
    return lambda: monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def refusal(given: object) -> str:
    with pytest.raises(PluginError) as caught:
        find_model(str(given))
    return str(caught.value)


def write_model(folder: Path, fold: str = "fold_0") -> Path:
    """Files where nnU-Net has those of a model, empty."""
    for name in ("plans.json", "dataset.json", f"{fold}/checkpoint_final.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", list(published_models()))
def test_every_published_model_is_complete(name: str) -> None:
    model = published_models()[name]
    if not model.structures:
        assert "is published" in model.note
        return
    assert len(model.structures) + 1 == model.outputs
    plain = [structure.lower() for structure in model.structures]
    assert list(LabelSystem.numbered(name, model.structures).classes) == plain
    assert [canonical_name(structure) for structure in model.structures] == plain
    assert model.size in PRESETS
    assert name.endswith(f"-{model.size}")
    assert all((model.modality, model.trained_on, model.licence, model.citation))
    assert (model.source is None) == bool(model.page and model.file)
    if model.source:
        assert web_address(model.source).startswith("https://huggingface.co/")
    if model.known_to_import:
        assert ["background", *model.structures] == published_facts()["labels"]


def test_parameters_are_those_of_the_network() -> None:
    assert TINY.parameters == sum(x.numel() for x in helpers.make_network().parameters())


def test_a_name_is_downloaded_and_imported_once(
    cache: Path, hub: Path, stunet: Stunet, offline: Offline
) -> None:
    folder = find_model(NAME)
    assert folder == cache / NAME
    assert is_model(folder)
    assert helpers.read(folder, "dataset")["labels"] == LABELS
    assert helpers.read(folder)["dataset_name"] == "Dataset101_Tiny"
    assert helpers.configuration(folder)["patch_size"] == [32, 32, 64]
    assert helpers.read(folder, "provenance")["source"] == TINY.source
    helpers.load_model(folder, stunet.patch)
    # Then it takes neither the network nor huggingface_hub, whatever the capitals.
    (hub / "asked").unlink()
    offline()
    assert find_model(NAME.title()) == find_model(str(TINY.source)) == folder
    assert not (hub / "asked").exists()


def test_what_is_here_is_found_without_torch(cache: Path) -> None:
    write_model(cache / "totalsegmentator-small")
    code = (
        "import sys; from stunet_plugin.segmentation.models import find_model;"
        " print(find_model('totalsegmentator-small'));"
        " assert not {'torch', 'numpy', 'nnunetv2', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(cache / "totalsegmentator-small"), done.stderr


def test_two_processes_import_once(cache: Path, hub: Path) -> None:
    environment = {**os.environ, "HUB_SECONDS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", FIND], env=environment, **pipes) for _ in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(out.endswith(f"{cache / NAME}\n") for out, _ in said)
    assert sum("Waiting" in out for out, _ in said) == 1
    assert sum("Download:" in out for out, _ in said) == 1
    # One finds the file, and the import it starts finds it again.
    asked = [line.split() for line in (hub / "asked").read_text().splitlines()]
    assert len({pid for pid, _ in asked}) == 2
    assert not list(cache.glob(".stunet_import_*"))


def test_an_address_of_the_hub_is_imported_once(cache: Path, hub: Path, offline: Offline) -> None:
    (hub / "other.model").symlink_to(hub / "tiny.model")
    (hub / "other.model.pkl").symlink_to(hub / "tiny.model.pkl")
    folder = find_model("hf://someone/models@v1/other.model")
    assert folder == cache / "someone_models_v1_other.model"
    assert helpers.read(folder, "dataset")["labels"]["class_4"] == 4
    offline()
    assert find_model("hf://someone/models@v1/other.model") == folder
    message = refusal("hf://someone/models/none.model")
    assert "the hub does not answer" in message
    assert f"stunet import none.model --out {cache}/someone_models_none.model" in message
    assert "hf://owner/repository/file" in refusal("hf://someone")


@pytest.mark.parametrize(("others", "found"), [(0, False), (1, True), (2, False)])
def test_a_plan_beside_a_renamed_checkpoint_is_found(hub: Path, others: int, found: bool) -> None:
    content = (hub / "tiny.model.pkl").read_bytes()
    (hub / "tiny.model.pkl").unlink()
    for number in range(others):
        (hub / f"Old{number}_tiny.model.pkl").write_bytes(content)
    if found:
        assert is_model(find_model(NAME))
    else:
        assert "has no plan, no tiny.model.pkl beside it" in refusal(NAME)


def test_a_failed_import_leaves_nothing_and_can_be_repeated(
    cache: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(TINY, structures=("liver",))
    monkeypatch.setitem(published_models(), NAME, wrong)
    assert "The weights have 5 outputs" in refusal(NAME)
    assert [path.name for path in cache.iterdir()] == [f".{NAME}.lock"]
    monkeypatch.setitem(published_models(), NAME, TINY)
    assert is_model(find_model(NAME))


@pytest.mark.parametrize("missing", ["network", "huggingface_hub", "download"])
def test_what_must_be_downloaded_by_hand_comes_with_its_command(
    missing: str, cache: Path, hub: Path, offline: Offline, stunet: Stunet
) -> None:
    model = TINY
    if missing == "network":
        (hub / "tiny.model").rename(hub / "away")
        offline()
    elif missing == "huggingface_hub":
        stunet.patch.setitem(sys.modules, "huggingface_hub", None)
    else:
        page = "https://example.org/drive"
        model = replace(TINY, source=None, page=page, file="Task1/fold_all/tiny.model", fold="all")
    stunet.patch.setitem(published_models(), NAME, model)
    message = refusal(NAME)
    assert message.startswith(f"{NAME} is not here yet")
    expected = {
        "network": "download https://huggingface.co/someone/models/resolve/main/tiny.model, and",
        "huggingface_hub": "pip install huggingface_hub",
        "download": "Download Task1/fold_all/tiny.model and the .pkl beside it from https://exa",
    }
    assert expected[missing] in message
    # The command works as it is pasted, in the folder of the download.
    helpers.write_v1(stunet.folder / "downloads" / "tiny.model")
    stunet.patch.chdir(stunet.folder / "downloads")
    program, *words = shlex.split(message.splitlines()[-1])
    assert program == "stunet"
    stunet(*words)
    assert find_model(NAME) == cache / NAME
    assert helpers.read(cache / NAME, "dataset")["labels"] == LABELS
    assert (cache / NAME / f"fold_{model.fold}").is_dir()


def test_a_model_of_unknown_channels_is_not_guessed(stunet: Stunet, cache: Path) -> None:
    message = refusal("brats21-base")
    assert "Neither the order of the four channels nor the meaning" in message
    source, out = "hf://blueyo0/STU-Net_BraTS21/base_ep1k.model", cache / "brats21-base"
    assert f"stunet import {source} --out {out} --labels background NAME_1" in message
    assert "not published" in stunet("models")
    assert "Neither the order" in stunet("models brats21-base")


def test_plans_of_another_name_are_in_the_command(cache: Path, hub: Path, offline: Offline) -> None:
    offline()
    message = refusal("feta21-base")
    assert "/base_ep1k.model and FeTA21_base_ep1k.model.pkl beside it" in message
    command = message.splitlines()[-1]
    assert f"--out {cache}/feta21-base --plans FeTA21_base_ep1k.model.pkl --name" in command


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "Dataset004_Organs"
    model = write_model(results / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    assert find_model(str(model)) == find_model(str(results)) == model
    monkeypatch.chdir(tmp_path)
    assert find_model(results.name) == model
    assert f"a fold. Give the model's folder: {model}" in refusal(model / "fold_0")
    write_model(results / "nnUNetTrainer__nnUNetPlans__2d", "fold_all")
    message = refusal(results)
    assert "holds 2 models" in message
    assert "nnUNetTrainer__nnUNetPlans__2d, nnUNetTrainer__nnUNetPlans__3d_fullres" in message


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "Did you mean totalsegmentator-small?" in refusal("totalsegmentator-smal")
    assert "Published models: stunet models." in refusal("nowhere/at/all")
    assert "it needs plans.json, dataset.json and fold_X" in refusal(tmp_path)
    old = helpers.write_v1(tmp_path / "old" / "fold_all" / "model_final_checkpoint.model", plans={})
    assert f"nnU-Net v1. Run: stunet import {old} --out FOLDER" in refusal(tmp_path / "old")
    assert f"not a model folder. Run: stunet import {old} --out" in refusal(old)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "home").touch()
    message = refusal(NAME)
    assert str(tmp_path / "home" / "models") in message
    assert "export STUNET_HOME=" in message


def test_the_table_of_models(stunet: Stunet, cache: Path) -> None:
    write_model(cache / "totalsegmentator-small")
    titles, *lines = stunet("models").splitlines()
    assert titles.split()[:3] == ["name", "modality", "parameters"]
    rows = {line.split()[0]: line for line in lines if line}
    assert set(published_models()) <= set(rows)
    small, drive = rows["totalsegmentator-small"], rows["abdomenatlas-base"]
    for fact in ("CT", "14.6 M", "117 MB", "hub", "Apache-2.0", "  yes  ", "104: adrenal_gland_"):
        assert fact in small
    for fact in ("not known", "browser", "not stated", "  no  ", "9: aorta, gallbladder, "):
        assert fact in drive
    assert str(cache) in lines[-1]


def test_one_model_with_all_structures(stunet: Stunet, cache: Path) -> None:
    said = stunet("models abdomenatlas-large")
    model = published_models()["abdomenatlas-large"]
    for value, structure in enumerate(model.structures, 1):
        assert f"\n{value:>5}  {structure}" in said
    for fact in (model.page, model.file, model.note, model.citation[1], "(not here yet)"):
        assert str(fact) in said
    assert "Did you mean ct-org-base?" in stunet.refuse("models ct-org")


def test_models_as_json(stunet: Stunet, cache: Path) -> None:
    write_model(cache / NAME)
    models = {model["name"]: model for model in json.loads(stunet("models --json"))}
    assert list(models) == list(published_models())
    one = json.loads(stunet("models --json", NAME))
    assert one == models[NAME]
    assert one["structures"] == list(TINY.structures)
    assert (one["here"], one["folder"]) == (True, str(cache / NAME))
    assert (one["source"], one["licence"], one["megabytes"]) == (TINY.source, "not stated", None)
    assert not models["totalsegmentator-huge"]["here"]


def test_home_is_a_known_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home"
    assert (
        f"STUNET_HOME={home()}: downloaded models and compiled networks"
        " (if not set: ~/.cache/stunet)"
    ) in Options().lines()
    for given, expected in (("", "caches/stunet"), ("~/x", "user/x"), ("rel", "rel")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "user"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
        monkeypatch.setenv("STUNET_HOME", given)
        assert home() == tmp_path / expected
    monkeypatch.delenv("STUNET_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home() == tmp_path / "user" / ".cache" / "stunet"
