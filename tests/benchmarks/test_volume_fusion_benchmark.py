"""The benchmark of the pretext pipeline: its yardstick computes the same, its script runs."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stunet_plugin.pretraining.subvolumes import stretch
from stunet_plugin.pretraining.volume_fusion import TiledBlocks, VolumeFusion


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of ``benchmarks/``, which as a script finds its neighbours in its own
    folder."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


def test_contrast_and_fusion_are_the_same_function(benchmarks: Callable[[str], ModuleType]) -> None:
    plain = benchmarks("plain_volume_fusion")
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16))
    low, high = np.percentile(image, [1.5, 99.0])
    ours = stretch(torch.from_numpy(image), float(low), float(high))
    assert ours.numpy() == pytest.approx(plain.contrast(image.copy(), 1.5, 99.0))
    foreground, background = np.random.default_rng(1).random((2, 1, 8, 8, 8))
    class_map = np.random.default_rng(2).integers(0, 5, (1, 8, 8, 8)).astype(np.uint8)
    fused = VolumeFusion(4).fuse(
        *(torch.from_numpy(array)[None] for array in (foreground, background, class_map[0])),
        (False,),
    )
    assert fused[0].numpy() == pytest.approx(plain.fuse(foreground, background, class_map))


def test_tiles_cover_as_much_as_the_published_ones(benchmarks: Callable[[str], ModuleType]) -> None:
    plain = benchmarks("plain_volume_fusion")
    random.seed(0)
    patch = (32, 64, 64)
    published = [np.bincount(plain.tile_classes(patch).ravel(), minlength=5) for _ in range(400)]
    scheme = TiledBlocks(smallest=(8 / 32, 8 / 64, 8 / 64), largest=(1.0, 0.5, 0.5))
    fusion = VolumeFusion(4, scheme)
    class_maps = fusion.class_maps(
        fusion.draw(400, patch, torch.Generator().manual_seed(0)), patch, torch.device("cpu")
    )
    ours = torch.bincount(class_maps.flatten().long(), minlength=5).numpy()
    assert ours / ours.sum() == pytest.approx(np.sum(published, 0) / np.sum(published), abs=0.02)


def test_the_script_reports_ours_beside_plain(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, capsys: object
) -> None:
    script = benchmarks("volume_fusion_pipeline")
    out = tmp_path / "report.json"
    size = ["--patch", "16", "24", "24", "--volume", "24", "40", "40"]
    assert (
        script.main(
            [*size, "--samples", "2", "--repeats", "1", "--processes", "1", "--out", str(out)]
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["results"][0]["ours_over_plain"]["median"] > 0
    assert "ours / plain" in out.with_suffix(".md").read_text()
    assert script.main(["--out", str(tmp_path / "nowhere" / "report.json")]) == 2
    assert script.main(["--samples", "0", "--out", str(out)]) == 2
