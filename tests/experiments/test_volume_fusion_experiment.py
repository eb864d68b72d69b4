"""The hippocampus experiment's arithmetic: splits, distances, table; its commands are printed
without being run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.trainers import __all__ as trainer_names

from import_helpers import make_network

SETTINGS = {
    "size": "small",
    "batch": 2,
    "patch": None,
    "pretrain_iterations": 60,
    "fine_tune_iterations": 30,
    "iterations_per_epoch": 10,
    "test_cases": 60,
    "cases": (4, 8),
    "seeds": (1, 2),
    "device": "cpu",
    "mirroring": True,
}


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of ``benchmarks/``, which as a script finds its neighbours in its own
    folder."""
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    return importlib.import_module


def test_splits_never_mix_and_depend_on_nothing_but_the_names(
    benchmarks: Callable[[str], ModuleType],
) -> None:
    script = benchmarks("common")
    settings = script.Settings(**SETTINGS)
    names = [f"case_{index:03d}" for index in range(217)]
    test, pool = script.hold_out(names, settings)
    assert (len(test), len(pool), len({*test, *pool})) == (60, 157, 217)
    assert script.hold_out(names[::-1], settings) == (test, pool)
    few, more, other = (script.draw_labelled(pool, *draw) for draw in ((1, 4), (1, 8), (2, 4)))
    assert set(few) < set(more) < set(pool)
    assert few != other
    with pytest.raises(PluginError, match="70 cases less 60 for testing leave 10, fewer than 16"):
        script.hold_out(names[:70], script.Settings(**{**SETTINGS, "cases": (4, 16)}))


def test_every_arm_names_trainers_and_pretrainings_that_exist(
    benchmarks: Callable[[str], ModuleType],
) -> None:
    arms = benchmarks("volume_fusion_arms")
    networks = arms.networks("small")
    everything = [arm for group in arms.GROUPS.values() for arm in group]
    for arm in everything:
        assert networks[arm.network].segmentation_trainer + arm.suffix in trainer_names
        assert networks[arm.network].pretext_trainer in trainer_names
        assert arm.pretraining is None or arms.PRETRAININGS[arm.pretraining].network == arm.network
    assert len({arm.folder for arm in everything}) == len(everything)


def test_surface_distances_in_millimetres(benchmarks: Callable[[str], ModuleType]) -> None:
    report = benchmarks("volume_fusion_report")
    first, second = np.zeros((2, 12, 12, 12), bool)
    first[2:6, 2:6, 2:6] = True
    second[4:8, 2:6, 2:6] = True
    scores = report.score_case(first, second, (0.5, 1, 1))
    assert scores["dice"] == 0.5
    # Only the two end faces (16 of 56 surface voxels each) and the sides between them are off, by
    # at most two slices of 0.5 mm.
    assert scores["hd95"] == pytest.approx(1.0)
    assert 0 < scores["assd"] < 1
    assert report.score_case(first, first, (0.5, 1, 1)) == {"dice": 1.0, "assd": 0.0, "hd95": 0.0}
    missed = report.score_case(first, np.zeros_like(first), (1, 1, 1))
    assert missed["dice"] == 0
    assert np.isnan(missed["assd"])
    assert report.score_case(*np.zeros((2, 4, 4, 4), bool), (1, 1, 1))["dice"] == 1


def test_table_averages_over_seeds_and_compares_with_scratch_of_the_same_seed(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    report = benchmarks("volume_fusion_report")
    for arm, dice in (
        ("stunet_scratch", {1: 0.5, 2: 0.6}),
        ("stunet_pretrained", {1: 0.7, 2: 0.7}),
        ("K___8", {1: 0.6}),
    ):
        for seed, value in dice.items():
            folder = tmp_path / "fine_tuning" / arm / f"cases_4_seed_{seed}"
            folder.mkdir(parents=True)
            hd95 = 2.0 if (arm, seed) == ("stunet_scratch", 1) else float("nan")
            cases = {"case": {"Anterior": {"dice": value, "assd": 1.0, "hd95": hd95}}}
            (folder / "scores.json").write_text(
                json.dumps({"train_loss": [1, 0.5], "seconds": 9, "cases": cases})
            )
    report.write_report(tmp_path, SETTINGS | {"merged": False}, tmp_path / "report.json", tmp_path)
    table = (tmp_path / "report.md").read_text().splitlines()
    assert (
        table[2]
        == "| stunet scratch | 4 | 0.550 ± 0.050 |  | 1.000 ± 0.000 | 2.000 ± 0.000 (of 1) | 2 |"
    )
    assert (
        table[3]
        == "| stunet pretrained | 4 | 0.700 ± 0.000 | +0.200, +0.100 | 1.000 ± 0.000 | none | 2 |"
    )
    assert table[4].startswith("| K = 8 | 4 | 0.600 ± 0.000 | +0.100 |")
    # NaN is no JSON.
    runs = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["runs"]
    assert [run["hd95"] for run in runs] == [2.0, None, None, None, None]
    assert (tmp_path / "volume_fusion_dice.png").stat().st_size > 0
    assert (tmp_path / "volume_fusion_loss.png").stat().st_size > 0
    assert (tmp_path / "volume_fusion_seeds.png").stat().st_size > 0


def test_dry_run_prints_the_commands_and_writes_nothing(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = benchmarks("volume_fusion")
    data = tmp_path / "data"
    (data / "labelsTr").mkdir(parents=True)
    for index in range(6):
        (data / "labelsTr" / f"case{index}.nii.gz").touch()
    arguments = [
        "--data",
        str(data),
        "--work",
        str(tmp_path / "work"),
        "--groups",
        "stunet",
        "--test-cases",
        "2",
    ]
    assert script.main([*arguments, "--cases", "4", "--seeds", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "-tr VolumeFusionTrainer_STUNet_small" in printed
    assert "-tr STUNetTrainer_small -p nnUNetPlans -device cpu -pretrained_weights" in printed
    assert not (tmp_path / "work").exists()
    assert (
        script.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--dry-run"]) == 2
    )


def test_merged_labels_keep_geometry_and_are_written_once(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = benchmarks("volume_fusion")
    source, target = tmp_path / "case.nii.gz", tmp_path / "merged" / "case.nii.gz"
    label = sitk.GetImageFromArray(np.arange(3, dtype=np.uint8).repeat(4).reshape(3, 2, 2))
    label.SetSpacing((0.5, 1, 2))
    sitk.WriteImage(label, str(source))
    for _ in range(2):
        script.merge_all([(source, target)], target.parent)
    merged = sitk.ReadImage(str(target))
    assert merged.GetSpacing() == (0.5, 1, 2)
    assert sitk.GetArrayFromImage(merged).max(axis=(1, 2)).tolist() == [0, 1, 1]
    assert [file.name for file in target.parent.iterdir()] == ["case.nii.gz"]


def test_work_folder_of_other_settings_is_refused(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = benchmarks("common")
    script.keep_settings(tmp_path, script.Settings(**SETTINGS))
    script.keep_settings(tmp_path, script.Settings(**SETTINGS))
    with pytest.raises(PluginError, match="begun with other settings .batch was 2.*another --work"):
        script.keep_settings(tmp_path, script.Settings(**{**SETTINGS, "batch": 4}))


def test_rescaled_features_leave_the_rest_of_the_network_as_it_was(
    benchmarks: Callable[[str], ModuleType],
) -> None:
    rescale = benchmarks("rescale_features")
    torch.manual_seed(0)
    network = make_network("tiny", outputs=3).apply(STUNet.initialize)
    network.decoder.deep_supervision = True
    images = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        before, spread = network(images), rescale.spreads(network, images)
        factors = [2.0, 0.5, 3.0, 1.0, 4.0]
        rescale.scale_features(network, factors)
        after = network(images)
    wanted = [old * factor for old, factor in zip(spread, factors, strict=True)]
    assert rescale.spreads(network, images) == pytest.approx(wanted, rel=1e-4)
    # Outputs come full resolution first; the heads' biases are zero, so the outputs are scaled as
    # the features are.
    for old, new, factor in zip(before, after, factors[::-1], strict=True):
        assert torch.allclose(new, old * factor, atol=1e-4 * factor)
    with pytest.raises(PluginError, match="tiny, small or base"), torch.device("meta"):
        rescale.scale_features(make_network("large", outputs=3), factors)
