"""Export of a promptable model as nnInteractive's published session (2.6.0) opens it, and with it
its viewers."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.inference.build_network import find_trainer
from stunet_plugin.interactive.session import PromptSession
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.prompts.channels import BOX, CHANNELS, DECAY, POINT, PREVIOUS, RADIUS, SCRIBBLE
from stunet_plugin.utils.files import read_json

if TYPE_CHECKING:
    from stunet_plugin.commands.export_nninteractive import ExportNnInteractive

LARGEST_BAD_PATCH = 48
"""Voxels of an axis with which the session fails when it refines; 64 were seen to work."""
TRAINER = "nnInteractiveTrainer_stub"
"""Of the session: builds the network that the plans name."""
INFERENCE_INFO = {
    "inference_class": "nnInteractiveInferenceSession",
    "supported_interactions": {
        "points": True,
        "bbox2d": True,
        "bbox3d": True,
        "scribble": True,
        "lasso": True,
    },
    # Without the mask so far, which is not counted.
    "interaction_channels": CHANNELS - 1,
    "channel_mapping": {
        "prev_seg": PREVIOUS,
        "bbox2d": [BOX, BOX + 1],
        "bbox3d": [BOX, BOX + 1],
        "lasso": [BOX, BOX + 1],
        "points": [POINT, POINT + 1],
        "scribble": [SCRIBBLE, SCRIBBLE + 1],
    },
    "point_radius": RADIUS,
    "interaction_decay": DECAY,
    "preferred_scribble_thickness": [2, 2, 2],
    "pad_mode_image": "constant",
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": True,
}


def export(options: ExportNnInteractive) -> int:
    """Write the folder, whole or not at all; return 0."""
    out = Path(os.path.abspath(Path(options.out).expanduser()))
    if out.exists():
        raise PluginError(f"-o {out} is there already. Name a new folder.")
    if not out.parent.is_dir():
        raise PluginError(f"-o {out}: there is no folder {out.parent}.")
    licence = _licence(options.license)
    session = PromptSession(options.model, options.fold, options.checkpoint)
    plans, configuration = _plans(session)
    _check(session, plans["configurations"][configuration], options.force)
    with tempfile.TemporaryDirectory(prefix=".partial", dir=out.parent) as folder:
        made = Path(folder, out.name)
        fold = made / f"fold_{session.model.folds[0]}"
        fold.mkdir(parents=True)
        facts = {**INFERENCE_INFO, "made_by": f"stunet-plugin {__version__}"}
        for name, content in (
            ("plans.json", plans),
            ("dataset.json", session.model.dataset),
            ("inference_info.json", facts),
        ):
            (made / name).write_text(json.dumps(content, indent=2))
        (made / "LICENSE").write_text(licence, encoding="utf-8")
        checkpoint = {
            "network_weights": session.model.predictor.network.state_dict(),
            "trainer_name": TRAINER,
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": None,
        }
        torch.save(checkpoint, fold / CHECKPOINT)
        made.rename(out)
    network = plans["configurations"][configuration]["architecture"]["network_class_name"]
    print(f"Model:        {out}")
    if network.startswith("stunet_plugin."):
        print("Viewers need stunet-plugin beside nnInteractive: pip install it there, too.")
    return 0


def _plans(session: PromptSession) -> tuple[dict[str, Any], str]:
    """Return plans of one configuration that name the network as the trainer built it."""
    model = session.model
    plans, name = read_json(model.folder / "plans.json"), model.configuration
    chosen = dict(model.predictor.configuration_manager.configuration)
    resolve = getattr(find_trainer(model.trainer), "resolve_architecture", None)
    if resolve is not None:
        chosen["architecture"] = resolve(chosen)
    chosen.pop("inherits_from", None)
    return {**plans, "configurations": {name: chosen}}, name


def _check(session: PromptSession, configuration: dict[str, Any], force: bool) -> None:
    """Raise a PluginError if viewers would fail with a model, or show it other images than it was
    trained on."""
    patch, channels = configuration["patch_size"], session.model.channels
    replan = "Plan with `stunet plan -d D -pl PromptPlanner_STUNet_base`, preprocess and train."
    if len(patch) != 3 or min(patch) <= LARGEST_BAD_PATCH:
        raise PluginError(
            f"The patch of {list(patch)} voxels is too small for the viewers' session, which fails"
            f" with {LARGEST_BAD_PATCH} or less along an axis, and takes volumes only. {replan}"
        )
    if channels != 1:
        raise PluginError(f"The viewers show one channel, this model takes {channels}.")
    problems = []
    if not str(configuration.get("resampling_fn_data")).startswith("no_resampling"):
        problems.append("resampled images (the viewers give the voxels as they are)")
    if configuration["normalization_schemes"] != ["ZScoreNormalization"] or any(
        configuration["use_mask_for_norm"]
    ):
        problems.append("another normalisation than the viewers' z-score")
    if set(session.radii) != {RADIUS}:
        problems.append(f"clicks of radius {list(session.radii)} (the viewers draw {RADIUS})")
    if problems and not force:
        raise PluginError(
            f"This model was trained with {'; '.join(problems)}. {replan} Or export it all the"
            " same: --force."
        )


def _licence(given: str) -> str:
    file = Path(given).expanduser()
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else given
    if not text.strip():
        raise PluginError("--license is empty. Name the licence of your model, such as CC BY 4.0.")
    return text.strip() + "\n"
