"""What is published about the four STU-Net weights, for checkpoints that come without their
``.model.pkl``.

The facts stand in ``stunet_plugin/data/published_stunet.json``: the plan of the four files (it is
one and the same) and the label order of their outputs. They were taken from the ``.model.pkl``
files and the label list of the release.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

from stunet_plugin.weights.identify import FoundWeights
from stunet_plugin.weights.output_labels import Labels
from stunet_plugin.weights.read_plans import plan_from_v1
from stunet_plugin.weights.source_plan import SourcePlan
from stunet_plugin.weights.stunet import STUNetWeights

DATA_FILE = "published_stunet.json"


def published_facts() -> dict[str, Any]:
    """Return the content of the data file."""
    content: dict[str, Any] = json.loads(
        files("stunet_plugin").joinpath("data", DATA_FILE).read_text()
    )
    return content


def published_checkpoint(weights: FoundWeights) -> str | None:
    """Return the name of the published file that weights of these sizes, channels and outputs are,
    or None."""
    facts = published_facts()
    if not isinstance(weights, STUNetWeights) or weights.preset is None:
        return None
    if (weights.input_channels, weights.outputs) != (1, len(facts["labels"])):
        return None
    names = {size: name for name, size in facts["checkpoints"].items()}
    return names.get(weights.preset.name)


def published_plan(checkpoint: str) -> SourcePlan:
    """Return the plan for a checkpoint that :func:`published_checkpoint` named."""
    plan = plan_from_v1(published_facts(), DATA_FILE)
    return replace(
        plan,
        origin=f"the published plan, as size, channels and outputs are those of {checkpoint}",
        published=True,
    )


def published_labels() -> Labels:
    return Labels.from_names(published_facts()["labels"], "the published label order")
