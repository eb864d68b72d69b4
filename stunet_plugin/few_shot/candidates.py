"""Candidates of a few-shot comparison: weights to start from, and trainings from scratch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.utilities.crossval_split import generate_crossval_split

from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED, SPLITS
from stunet_plugin.preparation.fitting_plans import Preparation, check_weights
from stunet_plugin.utils.files import folder_name
from stunet_plugin.weights.identify import NetworkWeights, read_weights, training_arguments
from stunet_plugin.weights.locate import Source, find_model
from stunet_plugin.weights.named import Named

if TYPE_CHECKING:
    from stunet_plugin.commands.few_shot import FewShot


@dataclass(frozen=True)
class Start:
    """Pretrained weights that can be fine-tuned: their file, what it holds, and the cases of the
    dataset that they were trained on."""

    name: str
    source: Source
    weights: NetworkWeights
    trained_on: frozenset[str]


@dataclass(frozen=True)
class Candidate:
    """A way to start: weights in a file, or (None) random ones, with trainer and plans."""

    name: str
    file: Path | None
    trainer: str
    plans: str

    @property
    def folder(self) -> str:
        return folder_name(self.name)


def read_starts(options: FewShot, given: Sequence[Named], raw: RawDataset) -> list[Start]:
    """Read the weights; raise PluginError for what cannot be fine-tuned on the dataset, or has no
    decoder where ``--rank`` needs one."""
    found = []
    for one in given:
        if not one.path:
            continue
        source = find_model(one.path)
        weights = read_weights(source.checkpoint)
        check_weights(weights, source, raw)
        if options.rank and weights.encoder_only:
            raise PluginError(
                f"{one.name} is an encoder without a decoder, whose features --rank compares. Leave"
                " --rank out: fine-tuning begins with a random decoder."
            )
        found.append(Start(one.name, source, weights, _trained_on(weights, source, raw)))
    folders = [folder_name(one.name) for one in given]
    if twice := [one.name for one in given if folders.count(folder_name(one.name)) > 1]:
        raise PluginError(f"{' and '.join(twice)} differ in signs alone. Give them other names.")
    return found


def _trained_on(weights: NetworkWeights, source: Source, raw: RawDataset) -> frozenset[str]:
    """Return the cases of the dataset that weights were trained on, by the fold in the checkpoint
    and the dataset's splits (nnU-Net's default ones where it has none)."""
    arguments, names = training_arguments(weights.checkpoint), sorted(x.name for x in raw.cases)
    plans, fold = arguments.get("plans"), arguments.get("fold")
    if not isinstance(plans, dict) or plans.get("dataset_name") != raw.name:
        return frozenset()
    root = os.environ.get(PREPROCESSED)
    file = Path(root, raw.name, SPLITS) if root else None
    try:
        if file is not None and file.is_file():
            splits = json.loads(file.read_text(encoding="utf-8"))
        else:
            splits = generate_crossval_split(names)
        # Of all cases, or of a fold that these splits do not have (nnU-Net then makes one): all.
        known = isinstance(fold, int) and fold < len(splits)
        return frozenset(map(str, splits[fold]["train"])) if known else frozenset(names)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PluginError(
            f"{source.checkpoint} was trained on {raw.name}, and {file} does not say on which"
            f" cases ({type(error).__name__})."
        ) from error


def find_candidates(
    given: Sequence[Named], starts: Sequence[Start], prepare: Preparation, plans: str | None
) -> list[Candidate]:
    """Return the candidates with plans that fit them, made where there are none; 'random' becomes a
    training from scratch for each network and plans among the weights."""
    found = []
    for start in starts:
        chosen = prepare.choose_plans(start.source, start.weights, plans)
        file = start.source.checkpoint.absolute()
        found.append(Candidate(start.name, file, f"{start.weights.trainer}_ft", chosen))
    different = {(one.trainer, one.plans): one for one in reversed(found)}
    for name in [one.name for one in given if not one.path]:
        for one in reversed(different.values()):
            title = f"{name}, like {one.name}" if len(different) > 1 else name
            found.append(Candidate(title, None, one.trainer.removesuffix("_ft"), one.plans))
    return found
