"""Small trainers of every family on the phantoms, in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from stunet_plugin.networks.anisotropy import get_mode
from stunet_plugin.networks.from_plan import resolve_planned, stunet_architecture
from stunet_plugin.networks.presets import PRESETS

Make = Callable[..., Any]
PATCH = [16, 32, 32]
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
    "file_ending": ".nii.gz",
}


def stunet(strides: list[list[int]] = STRIDES, width: int = 2) -> dict[str, Any]:
    """Return the architecture entry of a narrow STU-Net with these strides."""
    architecture, stages = stunet_architecture(PRESETS["tiny"], strides), len(strides)
    architecture["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=[width * min(2**stage, 4) for stage in range(stages)],
        kernel_sizes=[[3] * len(strides[0])] * stages,
        strides=strides,
        n_blocks_per_stage=[1] * stages,
        n_blocks_per_stage_decoder=[1] * (stages - 1),
    )
    return architecture


RESIDUAL = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": 4,
        "features_per_stage": [4, 8, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 3],
        "strides": STRIDES,
        "n_blocks_per_stage": [1, 2, 1, 1],
        "n_conv_per_stage_decoder": [1, 1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
"""A plan's narrow ResidualEncoderUNet, as nnU-Net's ResEnc planners write it."""


def misfm(network: str, mode: int = 1, **changes: Any) -> dict[str, Any]:
    """Return the architecture entry of a narrow PCTNet or FMUNet."""
    strides = [list(stage) for stage in get_mode(mode).strides]
    widths = [4, 8, 16, 32, 64] if network == "PCTNet" else [2, 4, 4, 4, 4]
    return {
        "network_class_name": f"stunet_plugin.networks.{network.lower()}.{network}",
        "arch_kwargs": {"mode": mode, "strides": strides, "features_per_stage": widths, **changes},
        "_kw_requires_import": [],
    }


def with_options(network: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture entry of a network with GRC and shape priors."""
    chosen = {"architecture": network, "patch_size": PATCH}
    options = {"grc": {}, "spm": {"hidden": 8, "dropout": 0}}
    return resolve_planned(chosen, "a trainer", options).architecture


def small_plans(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Return plans with a small patch, and a small network for a trainer, in all configurations."""
    plans = {**copy.deepcopy(plans), "continue_training": False}
    network = next((one for one in ("PCTNet", "FMUNet") if one in name), None)
    for configuration, chosen in plans["configurations"].items():
        if "architecture" not in chosen:
            continue
        first = 1 if configuration == "2d" else 0
        strides = [stage[first:] for stage in STRIDES]
        chosen.update(patch_size=PATCH[first:], batch_size=2)
        if network and not first:
            chosen["architecture"] = misfm(network)
        elif name == "STUNetTrainer":
            chosen["architecture"] = stunet(strides)
        else:
            chosen["architecture"]["arch_kwargs"].update(
                n_stages=4,
                features_per_stage=[4, 8, 8, 8],
                strides=strides,
                kernel_sizes=[[3] * len(strides[0])] * 4,
                n_conv_per_stage=[1] * 4,
                n_conv_per_stage_decoder=[1] * 3,
            )
    return plans


def started(trainer: Any) -> Any:
    """Initialise a trainer as nnU-Net does at the start of a training."""
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    return trainer


def batch_for(trainer: Any, seed: int = 1) -> dict[str, Any]:
    """Return a random batch of two samples; for Volume Fusion of two pairs."""
    random = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(4, trainer.num_input_channels, *patch, generator=random)
    if hasattr(trainer, "fusion"):
        return {"data": data}
    shapes = [
        [max(round(size * scale), 1) for size, scale in zip(patch, scales, strict=True)]
        for scales in trainer._get_deep_supervision_scales()
    ]
    targets = [torch.randint(0, 3, (2, 1, *shape), generator=random).short() for shape in shapes]
    return {"data": data[:2], "target": targets}


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Return copies of weights, buffers and momentum."""
    values = dict(trainer.network.state_dict())
    for number, momentum in trainer.optimizer.state_dict()["state"].items():
        values.update({f"{number} {name}": value for name, value in momentum.items()})
    return {name: value.detach().clone() for name, value in values.items() if value is not None}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are the same to the bit."""
    same = first.keys() == second.keys()
    return same and all(torch.equal(first[name], second[name]) for name in first)
