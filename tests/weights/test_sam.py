"""SAM-Med2D's and SAM's published files become models; nothing in them runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.sam import read_sam
from stunet_plugin.weights.sam_keys import POSITIONS, renamed

from conftest import Stunet
from import_helpers import MARKER, WritesAFile, checkpoint_in
from sam_helpers import Inputs, Prompts, fixtures

pytestmark = pytest.mark.shared
Weights = dict[str, torch.Tensor]


@pytest.fixture
def weights(shared: Path) -> Weights:
    return dict(fixtures(shared, "sammed2d_tiny_adapter")[0])


def published(weights: Weights) -> dict[str, Any]:
    """What the published training saves: the weights, and its Adam as an object."""
    trained = [torch.nn.Parameter(value.clone()) for value in list(weights.values())[:3]]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    sum(value.sum() for value in trained).backward()
    optimizer.step()
    return {"model": weights, "optimizer": optimizer}


@pytest.mark.parametrize("legacy", [False, True])
def test_published_file_becomes_a_model(legacy: bool, stunet: Stunet, weights: Weights) -> None:
    stunet.patch.setenv("STUNET_HOME", str(stunet.folder / "home"))
    file = stunet.folder / "sam-med2d_b.pth"
    torch.save(published(weights), file, _use_new_zipfile_serialization=not legacy)
    assert "SAM-Med2D, tiny, 352,004 parameters, 64 x 64 pixels" in stunet("inspect", file)
    said = stunet("import", file)
    folder = stunet.folder / "home" / "models" / "sam-med2d"
    assert f"Model folder: {folder}" in said
    assert "stunet prompt sam-med2d " in said
    written, ours = checkpoint_in(folder)["network_weights"], renamed(weights)
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], ours[name]) for name in ours)
    assert "Already there" in stunet("import", file)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    assert "imported" in stunet("inspect", checkpoint)
    again = read_sam(load_checkpoint(checkpoint), checkpoint)
    assert again is not None
    assert again.adapters
    assert "fine-tune" not in stunet.refuse("plan-like", checkpoint, "-d", 1)


def test_sam_is_fitted_to_small_images(stunet: Stunet, shared: Path) -> None:
    """A made-up SAM for images of twice the size, its positions linear in x and y."""
    weights = dict(fixtures(shared, "sammed2d_tiny_noadapter")[0])
    across = torch.arange(8.0)
    grid = across[:, None] + 100 * across
    weights[POSITIONS] = grid[None, ..., None].expand(1, 8, 8, 48).contiguous()
    tables = [f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"]
    for name in tables:
        weights[name] = torch.randn(15, 12)
    file = stunet.folder / "sam_vit_b_01ec64.pth"
    torch.save(weights, file)
    said = stunet("import", file, "--out", stunet.folder / "sam")
    assert "SAM without adapters, positions interpolated from 8 x 8 tokens, tiny" in said
    written = checkpoint_in(stunet.folder / "sam")["network_weights"]
    # The middle of two old tokens, in each direction.
    middle = torch.arange(4) * 2 + 0.5
    positions = written["vision_encoder.pos_embed"][0, ..., 0]
    torch.testing.assert_close(positions, middle[:, None] + 100 * middle)
    for name in tables:
        expected = interpolate(weights[name].T[None], 7, mode="linear")[0].T
        new = name.replace("image_encoder.blocks", "vision_encoder.layers")
        assert torch.equal(written[new], expected)
    model = read_sam({"network_weights": written}, file)
    assert model is not None
    images, boxes = torch.randn(1, 3, 64, 64), torch.tensor([[3.0, 4, 40, 50]])
    with torch.no_grad():
        masks = model.network()(Inputs(images, None, Prompts(boxes=boxes)))
    assert masks.logits.isfinite().all()


class Factory:
    """As a defaultdict's factory, this would be called by whoever asks for a missing key."""

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (WritesAFile(),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["optimizer", "state", "model", "factory"])
def test_nothing_in_a_file_runs(where: str, legacy: bool, stunet: Stunet, weights: Weights) -> None:
    stunet.patch.chdir(stunet.folder)
    content = published(weights)
    if where == "state":
        content["optimizer"].state["more"] = WritesAFile()
    elif where == "model":
        content["model"]["more"] = WritesAFile()
    else:
        content["optimizer"] = Factory() if where == "factory" else WritesAFile()
    torch.save(content, "evil.pth", _use_new_zipfile_serialization=not legacy)
    assert "posix.system" in stunet.refuse_import("evil.pth")
    assert not Path(MARKER).exists()


NORM = "image_encoder.blocks.2.norm1.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, "1 of 207 tensors are missing (for example vision_encoder.layers.2.layer"),
        ({NORM: torch.ones(47)}, "(47,), expected (48,)"),
        ({NORM: torch.full((48,), torch.nan)}, "1 of 207 tensors hold NaN or infinite"),
        ({NORM: torch.ones(48, dtype=torch.int64)}, "no plain tensor"),
        ({"image_encoder.more": torch.ones(1)}, "no part of a SAM-Med2D (for example vision_enc"),
        ({POSITIONS: torch.ones(1, 4, 4, 1280)}, "width 1280 and 4 x 4 tokens. Known is ViT-B"),
        ({POSITIONS: torch.ones(16, 48)}, "is not (1, tokens, tokens, width)"),
    ],
)
def test_wrong_weights_are_refused(
    changes: dict[str, Any], message: str, stunet: Stunet, weights: Weights
) -> None:
    changed = {name: x for name, x in {**weights, **changes}.items() if x is not None}
    file = stunet.folder / "wrong.pth"
    torch.save({"model": changed}, file)
    assert message in stunet.refuse_import(file)


def test_options_of_other_networks_are_refused(stunet: Stunet, weights: Weights) -> None:
    file = stunet.folder / "sam-med2d_b.pth"
    torch.save({"model": weights}, file)
    said = stunet.refuse_import(file, "--spacing 1 1 1 --fold 2")
    assert "--fold, --spacing: a SAM has no plan" in said
