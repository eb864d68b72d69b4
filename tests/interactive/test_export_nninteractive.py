"""Export for nnInteractive: the published session opens it and follows every kind of prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stunet_plugin.prompts.channels import CHANNELS

from conftest import Stunet
from prompt_helpers import AS_THEY_ARE, write_model

PATCH = [64, 64, 64]


def test_what_the_viewers_would_fail_with_is_refused(stunet: Stunet, tmp_path: Path) -> None:
    small = write_model(tmp_path / "a", **AS_THEY_ARE)
    resampled = write_model(tmp_path / "b", radii=(1, 4, 4), patch_size=PATCH)
    what = ("export-nninteractive", "-o", tmp_path / "out", "--license", "CC-BY-4.0")
    message = stunet.refuse(*what, small)
    assert "patch of [16, 32, 32] voxels is too small" in message
    assert "PromptPlanner_STUNet_base" in message
    message = stunet.refuse(*what, resampled)
    assert "resampled images" in message
    assert "z-score" in message
    assert "clicks of radius [1, 4, 4]" in message
    assert "is there already" in stunet.refuse(*what[:2], tmp_path, "--license", "x", small)
    stunet(*what, resampled, "--force")


def test_the_published_session_follows_every_prompt(stunet: Stunet, tmp_path: Path) -> None:
    pytest.importorskip("nnInteractive", reason="needs pip install nninteractive")
    from nnInteractive.inference.inference_session import nnInteractiveInferenceSession

    model = write_model(tmp_path, patch_size=PATCH, **AS_THEY_ARE)
    out = tmp_path / "viewer"
    told = stunet("export-nninteractive", model, "-o", out, "--license", "CC-BY-4.0")
    assert "Viewers need stunet-plugin beside nnInteractive" in told
    facts = json.loads((out / "inference_info.json").read_text())
    assert facts["interaction_channels"] == CHANNELS - 1
    session = nnInteractiveInferenceSession(
        device=torch.device("cpu"), do_autozoom=False, torch_n_threads=1
    )
    session.initialize_from_trained_model_folder(str(out))
    assert session.license == "CC-BY-4.0"
    seen: list[torch.Tensor] = []
    network = session.network

    def bright(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        output = network(x)  # the exported one takes what the session gives it
        assert output.shape == (1, 2, *PATCH)
        found = (x[:, 0] > 1).float()
        return torch.stack((0.5 - found, found - 0.5), 1)

    session.network = bright
    image = np.random.default_rng(1).normal(size=(1, 70, 72, 80)).astype(np.float32)
    image[:, 20:40, 20:40, 20:40] += 20
    session.set_image(image)
    target = torch.zeros(image.shape[1:], dtype=torch.uint8)
    session.set_target_buffer(target)
    drawing = np.zeros(image.shape[1:], np.uint8)
    drawing[30, 22:38, 22:38] = 1
    used = []
    with torch.inference_mode():
        for add in (
            lambda: session.add_point_interaction((30, 30, 30), include_interaction=True),
            lambda: session.add_point_interaction((30, 50, 30), include_interaction=False),
            lambda: session.add_bbox_interaction([[20, 40], [20, 40], [30, 31]], True),
            lambda: session.add_bbox_interaction([[20, 40], [20, 40], [20, 40]], True),
            lambda: session.add_scribble_interaction(drawing, include_interaction=True),
            lambda: session.add_lasso_interaction(drawing, include_interaction=False),
            lambda: session.add_initial_seg_interaction(drawing, run_prediction=True),
        ):
            session.reset_interactions()
            add()
            used.append(seen[-1][0, 1:].flatten(1).any(1).nonzero().flatten().tolist())
    assert used == [[3], [4], [1], [1], [5], [2], [0]]
    assert int(target.sum()) >= 8000
