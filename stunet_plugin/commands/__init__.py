"""Commands of ``stunet``, one light file each, in groups as ``stunet --help`` shows them."""

from stunet_plugin.commands.command import Command
from stunet_plugin.commands.crosseval import Crosseval
from stunet_plugin.commands.demo import Demo
from stunet_plugin.commands.doctor import Doctor
from stunet_plugin.commands.export_nninteractive import ExportNnInteractive
from stunet_plugin.commands.few_shot import FewShot
from stunet_plugin.commands.fine_tune import FineTune
from stunet_plugin.commands.import_ import Import
from stunet_plugin.commands.inspect import Inspect
from stunet_plugin.commands.list import List
from stunet_plugin.commands.merge_datasets import MergeDatasets
from stunet_plugin.commands.models import Models
from stunet_plugin.commands.path import Path
from stunet_plugin.commands.plan import Plan
from stunet_plugin.commands.plan_like import PlanLike
from stunet_plugin.commands.prompt import Prompt
from stunet_plugin.commands.pseudo_label import PseudoLabel
from stunet_plugin.commands.rank import Rank
from stunet_plugin.commands.register import Register, Unregister
from stunet_plugin.commands.segment import Segment
from stunet_plugin.commands.share import Share
from stunet_plugin.commands.unlabeled import Unlabeled

GROUPS: dict[str, tuple[type[Command], ...]] = {
    "segmentation": (Segment, Models, Prompt, ExportNnInteractive),
    "install": (Demo, Register, Unregister, Doctor, Path),
    "networks and plans": (List, Plan),
    "weights": (Import, Inspect, PlanLike, FineTune, Share),
    "data": (Unlabeled, PseudoLabel, MergeDatasets),
    "evaluation": (Rank, FewShot, Crosseval),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)
