"""Commands of ``stunet``, one light file each; COMMANDS lists them as ``stunet --help`` does."""

from __future__ import annotations

from stunet_plugin.commands.command import Command
from stunet_plugin.commands.crosseval import Crosseval
from stunet_plugin.commands.demo import Demo
from stunet_plugin.commands.doctor import Doctor
from stunet_plugin.commands.import_ import Import
from stunet_plugin.commands.inspect import Inspect
from stunet_plugin.commands.list import List
from stunet_plugin.commands.merge_datasets import MergeDatasets
from stunet_plugin.commands.path import Path
from stunet_plugin.commands.plan import Plan
from stunet_plugin.commands.plan_like import PlanLike
from stunet_plugin.commands.pseudo_label import PseudoLabel
from stunet_plugin.commands.rank import Rank
from stunet_plugin.commands.register import Register, Unregister
from stunet_plugin.commands.unlabeled import Unlabeled

COMMANDS: tuple[type[Command], ...] = (
    Demo,
    Register,
    Unregister,
    Doctor,
    Path,
    List,
    Plan,
    Import,
    Inspect,
    PlanLike,
    Rank,
    Unlabeled,
    PseudoLabel,
    MergeDatasets,
    Crosseval,
)
