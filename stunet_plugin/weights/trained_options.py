"""Network options that a checkpoint was trained with, as the plan in it says: no tensor tells of
GRC."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import options_of
from stunet_plugin.utils.validation import Fields
from stunet_plugin.weights.identify import training_arguments
from stunet_plugin.weights.read_plans import resolve_configuration

USE_ITS_TRAINER = (
    "Train with its trainer on the dataset's own plan, and -pretrained_weights with this file."
)


def trained_options(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the options, empty where there are none or no plan of nnU-Net v2."""
    arguments = training_arguments(checkpoint)
    plans, name = arguments.get("plans"), str(arguments.get("configuration"))
    if not isinstance(plans, dict) or name not in (plans.get("configurations") or ()):
        return []
    chosen = resolve_configuration(Fields(plans, "the plan in the checkpoint"), name)
    return [str(option) for option in options_of(chosen.values)]


def refuse_options(checkpoint: Mapping[str, Any], file: Path, instead: str) -> None:
    """Raise if a checkpoint was trained with network options, which would be lost; ``instead`` says
    what to do."""
    if options := trained_options(checkpoint):
        raise PluginError(
            f"{file} was trained with network options ({', '.join(options)}), which this command"
            f" would lose. {instead}"
        )
