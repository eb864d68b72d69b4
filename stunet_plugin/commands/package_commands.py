"""Commands whose arguments and work stand in packages of their own, as data. Imports nothing heavy.

``rank`` and the like: a line here makes them known to ``stunet``; parsing and running are imported
when they are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from stunet_plugin.nnunet.commands import interruptible


@dataclass(frozen=True)
class PackageCommand:
    """A command.

    Attributes:
        name, summary, example: as in ``stunet --help``.
        arguments: ``module:function`` that adds its arguments to a parser; light.
        options: ``module:class`` of its options, with a classmethod ``from_arguments``.
        run: ``module:function`` that takes the options and returns an exit code.
        interrupted: what a user reads last after Ctrl-C: how it goes on.
    """

    name: str
    summary: str
    example: str
    arguments: str
    options: str
    run: str
    interrupted: str = "The same command goes on where it stopped."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _imported(self.arguments)(parser)

    def __call__(self, given: argparse.Namespace) -> int:
        with interruptible(self.interrupted):
            # Wrong options are refused before what runs is imported, which may take seconds.
            options = _imported(self.options).from_arguments(given)
            code: int = _imported(self.run)(options)
            return code


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"stunet_plugin.{module}"), name)


COMMANDS = (
    PackageCommand(
        "crosseval",
        "Run models on datasets and compare them on the classes that they share: tables, tests,"
        " pictures, a report.",
        "stunet crosseval --model A=MODEL_FOLDER --dataset AMOS=Dataset218_AMOS,labels=AMOS -o"
        " crosseval",
        "commands.crosseval_arguments:add_crosseval_arguments",
        "crosseval.run:Run",
        "crosseval.run:run_crosseval",
    ),
    PackageCommand(
        "rank",
        "Rank pretrained weights for a labelled dataset without training (CCFV).",
        "stunet rank ct=MODEL_FOLDER mr=checkpoint_final.pth random -d 4 -p nnUNetPlans --json"
        " ranking.json",
        "commands.rank_arguments:add_rank_arguments",
        "ranking.options:RankOptions",
        "ranking.run:run_rank",
        "Nothing was written; the same command begins anew.",
    ),
    PackageCommand(
        "pseudo-label",
        "Make a dataset of a model's predictions on unlabelled images, with doubtful voxels as"
        " nnU-Net's ignore label.",
        "stunet pseudo-label MODEL_FOLDER -i IMAGES -d 910 -n Pseudo --min-confidence 0.8"
        " --ignore-below 0.6",
        "commands.dataset_arguments:add_pseudo_label_arguments",
        "datasets.pseudo_label:PseudoLabelOptions",
        "datasets.pseudo_label:run_pseudo_label",
    ),
    PackageCommand(
        "merge-datasets",
        "Make one dataset of several with different labels, for joint training.",
        "stunet merge-datasets 4 910 -d 920 -n Joint --train-only 910 &&"
        " nnUNetv2_plan_and_preprocess -d 920 -c 3d_fullres",
        "commands.dataset_arguments:add_merge_arguments",
        "datasets.merge:MergeOptions",
        "datasets.merge:run_merge",
    ),
)
