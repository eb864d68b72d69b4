"""SelfTrainingTrainer for the plan's network, ``SelfTrainingTrainer_STUNet_base`` etc. for STU-Net:
they go on with a model of a source on unlabelled cases of a target (docs/datasets.md)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.options import SELF_TRAINING, SHARD, Options
from stunet_plugin.self_training.domains import Domains, check_teacher
from stunet_plugin.self_training.loss import (
    MEAN_TEACHER,
    PLAIN,
    SelfTrainingLoss,
    Step,
    follow,
    horizon,
)
from stunet_plugin.self_training.views import strong_view
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.planned_trainers import TRAINERS as PLANNED
from stunet_plugin.trainers.safe_trainer import read_to_resume
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET
from stunet_plugin.weights.pretrained import pretrained_weights_on_command_line, read_checkpoint

ENTRY = "self_training"
"""Of the optimizer's state in a checkpoint: what a resumed training goes on with."""
MOST_CASES = 200
"""Cases of the target that are looked through for classes, at most."""


class SelfTrainingMixin(PluginTrainer):
    """Trains on labels of the source and on what an arm makes of the target; comes before the
    network's trainer among the bases."""

    domains: Domains
    teacher: nn.Module | None = None
    arm: str
    _restored: Mapping[str, Any] | None = None
    _steps_of_epoch = 0

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        self.arm = chosen_arm()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.domains = Domains.of(self.dataset_json)

    @classmethod
    def check_input(cls, plans: dict, configuration: str, fold: int | str, dataset: dict) -> None:
        super().check_input(plans, configuration, fold, dataset)
        Domains.of(dataset)
        manager, arm = PlansManager(plans), chosen_arm()
        chosen = manager.get_configuration(configuration)
        if chosen.previous_stage_name is not None:
            raise PluginError(
                f"{configuration} is the second stage of a cascade, whose input is a prediction of"
                " the first. Self-training is for one stage: train 3d_fullres or 3d_lowres."
            )
        if manager.get_label_manager(dataset).has_regions and arm != PLAIN:
            raise PluginError(
                f"{SELF_TRAINING.variable}={arm} takes labels that exclude each other; this"
                f" dataset has regions. Set {SELF_TRAINING.variable}={PLAIN}."
            )
        if Options().whole(SHARD, 0):
            raise PluginError(
                f"{cls.__name__} does not train sharded: unset {SHARD.variable}. Several processes"
                " without sharding are possible."
            )
        if file := pretrained_weights_on_command_line(sys.argv):
            checkpoint = read_checkpoint(file, "-pretrained_weights")
            check_teacher(checkpoint, plans, chosen.configuration)

    def _build_loss(self) -> nn.Module:
        if self.arm == PLAIN:
            return super()._build_loss()
        manager = copy.copy(self.label_manager)
        if not manager.has_ignore_label:
            # For the loss alone: nnU-Net's loader would look for voxels by it.
            manager._ignore_label = max(manager.all_labels) + 1
        with self._temporarily(label_manager=manager):
            return SelfTrainingLoss(super()._build_loss(), manager.ignore_label)

    def initialize(self) -> None:
        super().initialize()
        self.optimizer.register_state_dict_post_hook(self._add_state)
        self.optimizer.register_load_state_dict_pre_hook(self._take_state)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        training, validation = super().get_tr_and_val_datasets()
        training.identifiers = self.domains.balanced(training.identifiers)
        return training, validation

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.arm == MEAN_TEACHER:
            self.teacher = self._make_teacher()
            if self._restored is not None:
                self.teacher.load_state_dict(self._restored["teacher"])
        cases = self.dataloader_train_cases()
        target = [case for case in cases if self.domains.is_target(case)]
        use = "are not used" if self.arm == MEAN_TEACHER else "are trained on"
        self.print_to_log_file(
            f"Self-training ({self.arm}): {len(cases) - len(target)} cases of the source,"
            f" {len(target)} of the target, whose labels, predictions of a model, {use}."
        )
        if lacking := self._classes_without_voxels(target):
            self.print_banner(
                f"No case of the target is labelled {', '.join(lacking)}: the model that labelled"
                " them never predicts it there, so nothing of the target teaches it.\nDoes that"
                " model suit the images (orientation, spacing, contrast)? See docs/datasets.md."
            )

    def dataloader_train_cases(self) -> list[str]:
        """Return the training cases of this fold, each once."""
        return list(dict.fromkeys(self.do_split()[0]))

    def _classes_without_voxels(self, target: list[str]) -> list[str]:
        """Return classes that no label map of the target has, by the lists that nnU-Net's
        preprocessing made."""
        dataset = self.dataset_class(self.preprocessed_dataset_folder, target[:MOST_CASES])
        names = {y: x for x, y in self.dataset_json["labels"].items() if isinstance(y, int)}
        lacking = set(self.label_manager.foreground_labels) & set(names)
        for case in target[:MOST_CASES]:
            if not lacking:
                break
            places = dataset.load_case(case)[-1]["class_locations"]
            lacking -= {x for x in lacking if len(places.get(x, ()))}
        return [names[x] for x in sorted(lacking)]

    def _make_teacher(self) -> nn.Module:
        """Return a copy of the network that predicts in full resolution."""
        network: Any = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        network.load_state_dict(self._bare_network().state_dict())
        network.decoder.deep_supervision = False
        return network.eval().requires_grad_(False)

    def train_step(self, batch: dict) -> dict:
        if self.teacher is None:
            plain: dict[str, Any] = super().train_step(batch)
            return plain
        target = torch.tensor([self.domains.is_target(str(case)) for case in batch["keys"]])
        target = target.to(self.device)
        data, probabilities = self._views(batch["data"].to(self.device, non_blocking=True), target)
        total, done = self.num_epochs * self.num_iterations_per_epoch, self._steps_of_epoch
        done += self.current_epoch * self.num_iterations_per_epoch
        self.loss.step = Step(target, done / total, probabilities)
        try:
            result: dict[str, Any] = super().train_step({**batch, "data": data})
        finally:
            self.loss.step = None
        self._steps_of_epoch += 1
        if self._step_was_made:
            follow(self.teacher, self._bare_network(), horizon(total))
        return result

    @torch.no_grad()
    def _views(self, data: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch with the target's samples in the strong view, and the teacher's
        probabilities for their weak one."""
        assert self.teacher is not None
        weak = data[target]
        classes = self.label_manager.num_segmentation_heads
        probabilities = data.new_zeros(0, classes, *data.shape[2:])
        if len(weak):
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                logits = self.teacher(weak)
            probabilities = logits.float().softmax(1)
            data = data.clone()
            data[target] = strong_view(weak)
        return data, probabilities

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self._steps_of_epoch = 0

    def _add_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {"arm": self.arm}
        if self.teacher is not None:
            entry["teacher"] = self.teacher.state_dict()
        return {**state, ENTRY: entry}

    def _take_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        self._restored = state.get(ENTRY)
        return {name: value for name, value in state.items() if name != ENTRY}

    def check_resumable(self, file: str) -> None:
        super().check_resumable(file)
        entry = read_to_resume(file)["optimizer_state"].get(ENTRY, {})
        if entry.get("arm") != self.arm:
            was = entry.get("arm")
            of = f"{SELF_TRAINING.variable}={was}" if was else "a training that was none"
            raise PluginError(
                f"Cannot resume {SELF_TRAINING.variable}={self.arm} from {file}: it is of"
                f" {of}. Use the same, or start again without --c."
            )


def chosen_arm() -> str:
    return Options().word(SELF_TRAINING) or PLAIN


NETWORKS: dict[str, type[PluginTrainer]] = {
    "SelfTrainingTrainer": PLANNED["PlannedTrainer_ft"],
    **{f"SelfTrainingTrainer_STUNet_{x}": STUNET[f"STUNetTrainer_{x}_ft"] for x in PRESETS},
}
"""By the trainer's name: the trainer of the network."""


def _make_trainer(name: str, network: type[PluginTrainer]) -> type[SelfTrainingMixin]:
    attributes = {
        "__doc__": f"Goes on with a model of {network.__name__.removesuffix('_ft')} on"
        " pseudo-labelled cases of another hospital.",
        "__module__": __name__,
    }
    return type(name, (SelfTrainingMixin, network), attributes)


TRAINERS = {name: _make_trainer(name, network) for name, network in NETWORKS.items()}
globals().update(TRAINERS)
