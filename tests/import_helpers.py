"""Checkpoints in the published formats, made from random weights, and models imported from them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.weights.source_plan import RESAMPLING

MARKER = "code_was_run"


class WritesAFile:
    """Unpickled by pickle itself, this would run a shell command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


STRIDES = [[1, 1, 1], *([[2, 2, 2]] * 4), [1, 1, 2]]

_TO_PUBLISHED = (
    (r"encoder\.stages\.", "conv_blocks_context."),
    (r"decoder\.upsample_convs\.(\d+)\.", r"upsample_layers.\1.conv."),
    (r"decoder\.stages\.", "conv_blocks_localization."),
    (r"decoder\.seg_layers\.", "seg_outputs."),
    (r"\.shortcut\.", ".conv3."),
)


def make_network(size: str = "tiny", channels: int = 1, outputs: int = 5) -> STUNet:
    """A network of a published size with its initial (random) weights."""
    arguments = stunet_architecture(PRESETS[size], STRIDES)["arch_kwargs"]
    return STUNet(channels, outputs, **(arguments | {"conv_op": torch.nn.Conv3d}))


def published_weights(network: torch.nn.Module) -> OrderedDict[str, Any]:
    """The weights under their published names."""
    weights = OrderedDict()
    for name, value in network.state_dict().items():
        for pattern, replacement in _TO_PUBLISHED:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    return weights


def v1_checkpoint(weights: dict[str, Any]) -> dict[str, Any]:
    """What nnU-Net v1 saves, numpy scalars included."""
    return {
        "epoch": 4000,
        "state_dict": weights,
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "best_stuff": (None, np.float64(0.3), np.float64(0.9)),
    }


def v1_plans(channels: int = 1) -> dict[str, Any]:
    """The ``.model.pkl`` of nnU-Net v1, in numpy as v1 writes it."""
    stage = {
        "batch_size": 2,
        "patch_size": np.array([32, 32, 64]),
        "median_patient_size_in_voxels": np.array([100, 110, 120]),
        "current_spacing": np.array([1.5, 1.5, 1.5]),
        "pool_op_kernel_sizes": STRIDES[1:],
    }
    plans = {
        "modalities": dict.fromkeys(range(channels), "nonCT"),
        "normalization_schemes": OrderedDict.fromkeys(range(channels), "nonCT"),
        "use_mask_for_norm": OrderedDict.fromkeys(range(channels), False),
        "transpose_forward": [np.int64(0), 1, 2],
        "dataset_properties": {"intensityproperties": None},
        "plans_per_stage": {0: stage},
    }
    return OrderedDict(
        init=("", 0, "", "", False, 0, True, False, True), name="STUNetTrainer_tiny", plans=plans
    )


UNET_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]


def unet_entry(kind: str = "ResidualEncoderUNet", **changes: Any) -> dict[str, Any]:
    """The ``architecture`` entry of a narrow U-Net of nnU-Net, as its planners write it."""
    residual = kind == "ResidualEncoderUNet"
    depths = {"n_blocks_per_stage": [1, 2, 1, 1]} if residual else {"n_conv_per_stage": [2] * 4}
    kwargs = {
        "n_stages": 4,
        "features_per_stage": [4, 8, 16, 16],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 3],
        "strides": UNET_STRIDES,
        **depths,
        "n_conv_per_stage_decoder": [1 if residual else 2] * 3,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_unet(entry: dict[str, Any], channels: int = 1, outputs: int = 5) -> Any:
    """A network of such an entry, whose values all matter to the output."""
    torch.manual_seed(0)
    network = get_network_from_plans(*entry.values(), channels, outputs, deep_supervision=False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def unet_checkpoint(path: Path, entry: dict[str, Any], **changes: Any) -> Path:
    """What nnU-Net v2 saves of a trained U-Net; its trainer is somebody else's."""
    change = {
        "configurations/3d_fullres/architecture": entry,
        "configurations/3d_fullres/patch_size": [16, 32, 32],
    }
    arguments = {
        "plans": with_changes(v2_plans(), change),
        "configuration": "3d_fullres",
        "fold": 0,
        "dataset_json": {
            "channel_names": {"0": "CT"},
            "labels": {name: value for value, name in enumerate(("background", *"abcd"))},
            "file_ending": ".nii.gz",
        },
    }
    content = {
        "network_weights": make_unet(entry).state_dict(),
        "init_args": arguments,
        "trainer_name": "TrainerOfSomebody",
        "inference_allowed_mirroring_axes": None,
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def nnssl_checkpoint(
    path: Path, entry: dict[str, Any], part: str = "", prefix: str = "", **changes: Any
) -> Path:
    """What nnssl saves (adaptation_plan.py there): tensors of one part or all, under a prefix."""
    kind = entry["network_class_name"].rpartition(".")[2]
    stem = "encoder.stem" if kind == "ResidualEncoderUNet" else "encoder.stages.0"
    images = {
        "spacing": [1, 1, 1],
        "patch_size": [16, 32, 32],
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    plan = {
        "architecture_plans": {
            "arch_class_name": kind,
            "arch_kwargs": entry["arch_kwargs"],
            "arch_kwargs_requiring_import": entry["_kw_requires_import"],
        },
        "pretrain_plan": {
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "configurations": {"onemmiso": images},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [16, 32, 32],
        "key_to_encoder": f"{prefix}encoder.stages",
        "key_to_stem": f"{prefix}{stem}",
        "keys_to_in_proj": [f"{prefix}{stem}.convs.0.conv"],
        "key_to_lpe": None,
    }
    weights = make_unet(entry, outputs=1).state_dict().items()
    content = {
        "network_weights": {f"{prefix}{x}": y for x, y in weights if x.startswith(part)},
        "nnssl_adaptation_plan": with_changes(plan, changes),
    }
    content["network_weights"]["projector.weight"] = torch.ones(2, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def v2_plans() -> dict[str, Any]:
    """Plans of nnU-Net v2's default planner."""
    configuration = {
        "batch_size": 2,
        "patch_size": [32, 32, 64],
        "median_image_size_in_voxels": [100.0, 110.0, 120.0],
        "spacing": [1.0, 0.8, 0.8],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": STRIDES},
        },
        "batch_dice": True,
        "preprocessor_name": "DefaultPreprocessor",
        **RESAMPLING,
    }
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": {"patch_size": [64, 64]}, "3d_fullres": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 10.0, "std": 2.0}},
    }


def write_v1(
    path: Path, weights: dict[str, Any] | None = None, plans: dict[str, Any] | None = None
) -> Path:
    """Write a v1 checkpoint (random, if no weights are given) and its .pkl, unless plans={}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(v1_checkpoint(weights or published_weights(make_network())), path)
    if plans is None or plans:
        path.with_name(path.name + ".pkl").write_bytes(pickle.dumps(plans or v1_plans()))
    return path


def with_changes(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy with values replaced; keys are paths such as ``configurations/2d/patch_size``."""
    changed = copy.deepcopy(content)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in key.split("/")]
        entry: Any = changed
        for part in parents:
            entry = entry[part] if part in entry else entry[str(part)]
        entry[last] = value
    return changed


def read(folder: Path, name: str = "plans") -> dict[str, Any]:
    """A JSON file of a folder."""
    return json.loads((folder / f"{name}.json").read_text())


def configuration(folder: Path, name: str = "plans") -> dict[str, Any]:
    return read(folder, name)["configurations"]["3d_fullres"]


def checkpoint_of(folder: Path) -> Path:
    return folder / "fold_0" / "checkpoint_final.pth"


def checkpoint_in(folder: Path) -> dict[str, Any]:
    """The checkpoint of an imported model folder, loaded as strictly as torch can."""
    return torch.load(checkpoint_of(folder), weights_only=True)


def load_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nnUNetPredictor:
    """nnU-Net's predictor of a model folder; every window counts alike."""
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    options = {"use_gaussian": False, "use_mirroring": False, "allow_tqdm": False}
    predictor = nnUNetPredictor(**options, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
    predictor.network.eval()
    return predictor
