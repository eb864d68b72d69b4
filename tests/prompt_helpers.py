"""A network that does as it is told, and promptable models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet_plugin.inference.build_network import build_network
from stunet_plugin.prompts.channels import PREVIOUS

EARLIER = Path(__file__).resolve().parent / "data/earlier_models"
PLANS = EARLIER / "STUNetTrainer__EarlierPlans__3d_fullres" / "plans.json"
AS_THEY_ARE = {
    **{f"resampling_fn_{kind}": "no_resampling_hack" for kind in ("data", "seg", "probabilities")},
    **{f"resampling_fn_{kind}_kwargs": {} for kind in ("data", "seg", "probabilities")},
    "normalization_schemes": ["ZScoreNormalization"],
}
"""Changes of a plan to what a PromptPlanner plans."""


class Obedient(nn.Module):
    """Finds what is bright, where anything is prompted or was found, but not near a denial."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += 1
        bright, prompts = x[:, 0] > 0.5, x[:, 1:]
        wanted = prompts[:, [PREVIOUS, 1, 3, 5]].flatten(1).any(1)
        wanted = wanted.reshape(-1, *[1] * (bright.ndim - 1))
        found = bright & wanted & ~(prompts[:, [2, 4, 6]] > 0).any(1)
        return torch.stack((0.5 - found.float(), found.float() - 0.5), 1)


def write_model(folder: Path, radii: Any = (4, 4, 4), reader: str = "", **changes: Any) -> Path:
    """Write a promptable model folder with random weights, with changes of the configuration."""
    plans = json.loads(PLANS.read_text())
    plans["configurations"]["3d_fullres"].update(changes)
    plans["image_reader_writer"] = reader or plans["image_reader_writer"]
    dataset: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "object": 1},
        "file_ending": ".nii.gz",
        "numTraining": 6,
    }
    if radii:
        dataset["prompts"] = {"labels": {"background": 0, "a": 1}, "radii": list(radii)}
    model = folder / "PromptTrainer__Plans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(plans)
    torch.manual_seed(1)
    chosen = manager.get_configuration("3d_fullres")
    network = build_network("PromptTrainer", manager, chosen, 1, 2, deep_supervision=False)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "PromptTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model
