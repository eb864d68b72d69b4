"""``stunet fine-tune``: from a checkpoint and a raw dataset to a trained model; refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stunet_plugin.cli import main
from stunet_plugin.fine_tuning import run

from conftest import PHANTOM_ID, Stock, Stunet, Workspace
from dataset_helpers import change_json, write_dataset
from import_helpers import nnssl_checkpoint, unet_checkpoint, unet_entry, write_v1


@pytest.mark.slow
def test_what_is_left_to_do_is_done_once(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """With an encoder of nnssl, for which the dataset's own plan has no network. The tutorial runs
    the commands as processes."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(run, "run_command", Stock(nnunet_environment))
    spacing = {"pretrain_plan/configurations/onemmiso/spacing": [9, 9, 9]}
    source = nnunet_environment.root / "ssl.pth"
    nnssl_checkpoint(source, unet_entry(), "encoder.", "net.", **spacing)
    words = ["fine-tune", str(source), "-d", PHANTOM_ID, "-np", "1", "--device", "cpu"]
    assert main(words) == 0
    said = capfd.readouterr().out
    commands = [line.split()[1] for line in said.splitlines() if line.startswith("  $ ")]
    assert commands == ["stunet", "nnUNetv2_preprocess", "nnUNetv2_train"]
    assert "the decoder starts at random" in said
    plans, trainer = "ResidualEncoderUNetPlans_like_model", "PlannedTrainer_ft"
    model = nnunet_environment.model(trainer, plans=plans)
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "Trained already" in said
    assert "  $ " not in said
    other = nnunet_environment.root / "other.pth"
    nnssl_checkpoint(other, unet_entry(), "encoder.", "net.", **spacing)
    assert main([words[0], str(other), *words[2:]]) == 2
    assert "did not start from" in capfd.readouterr().err
    spacing["pretrain_plan/configurations/onemmiso/spacing"] = [4, 4, 4]
    nnssl_checkpoint(other, unet_entry(), "encoder.", "net.", **spacing)
    assert main([words[0], str(other), *words[2:]]) == 2
    assert "they are like another pretraining" in capfd.readouterr().err


def test_wrong_input_is_refused(stunet: Stunet, nnunet_folders: Path, tmp_path: Path) -> None:
    raw = nnunet_folders / "nnUNet_raw" / "Dataset007_Mine"
    write_dataset(raw, {"background": 0, "a": 1}, 5)
    unet = unet_checkpoint(tmp_path / "unet.pth", unet_entry())
    weights = torch.load(unet, weights_only=True)
    weights["network_weights"] = {"blocks.0.attention.weight": torch.ones(3, 3)}
    torch.save(weights, tmp_path / "unknown.pth")
    for words, message in (
        (f"{write_v1(tmp_path / 'x.model')} -d 7", "Run: stunet import"),
        (f"{tmp_path / 'unknown.pth'} -d 7", "no network that is known here"),
        (f"{unet} -d 7 -p Mine", "there is no"),
        (f"{unet} -d 7 -f one", "-f must be a number or 'all'"),
        (f"{unet} -d 8", "Expected one Dataset008_"),
        (f"{unet} -d {raw.parent}", "dataset.json"),
    ):
        assert message in stunet.refuse("fine-tune", words), words
    for image in list((raw / "imagesTr").iterdir()):
        shutil.copy(image, str(image).replace("_0000", "_0001"))
    change_json(raw / "dataset.json", channel_names={"0": "CT", "1": "PET"})
    assert "--in-channels 2" in stunet.refuse("fine-tune", f"{unet} -d 7")
