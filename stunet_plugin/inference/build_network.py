"""Network of a trainer, built without training it, registered or not."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from stunet_plugin.errors import PluginError, did_you_mean
from stunet_plugin.trainers import TRAINERS


def build_network(
    trainer_name: str,
    plans: PlansManager,
    configuration: ConfigurationManager,
    channels: int,
    outputs: int,
    deep_supervision: bool,
) -> nn.Module:
    """Build a network as nnU-Net does, with its initial weights.

    Raises:
        PluginError: nobody knows the trainer, or it refuses the plan.
    """
    build = find_trainer(trainer_name).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        planned: tuple = plans, configuration
    else:  # as nnU-Net 2.8 still calls trainers that were written for older releases
        planned = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    network: nn.Module = build(*planned, channels, outputs, deep_supervision)
    return network


def find_trainer(name: str) -> Any:
    """Return a trainer class by name, whether or not the plugin is registered.

    Raises:
        PluginError: nobody knows it.
    """
    if name in TRAINERS:
        return TRAINERS[name]
    if name == nnUNetTrainer.__name__:
        return nnUNetTrainer
    # Imports all of nnU-Net's trainers.
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        # It prints every module that it looks into.
        with contextlib.redirect_stdout(None):
            return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, ImportError) as error:
        raise PluginError(
            f"Neither this plugin nor nnU-Net knows the trainer {name}. If it is your own, set"
            f" nnUNet_extTrainer to its folder.{did_you_mean(name, TRAINERS, 0.8)}"
        ) from error
