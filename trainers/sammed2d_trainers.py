"""SAMMed2DTrainer: fine-tunes SAM-Med2D on the slices of a 2d plan, with objects drawn from the
labels. ``SAMMed2DTrainer_tiny`` trains a tiny one from scratch, for tests and dry runs.

A step as published (github.com/OpenGVLab/SAM-Med2D, read for facts): a box or a point, then eight
corrections from the same embedded images, an optimizer step after each. Deviations: the whole
prompt encoder learns (in the published code points and mask prompts never do), gradients are
clipped, and augmentation and learning rate schedule are nnU-Net's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import Resolved
from stunet_plugin.networks.presets import SAM_PRESETS, SAMPreset
from stunet_plugin.networks.topology import Strides
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.distributed_trainer import world_size
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.weights.pretrained import Pretrained

OBJECTS = 5
"""Drawn from each image, with replacement."""
CORRECTION_STEPS = 8
"""Of these one of the middle and the last have the mask so far as their only prompt."""
IMAGE_CHANNELS = (1, 3)


class SAMMed2DTrainer(PluginTrainer):
    """Fine-tunes SAM-Med2D: adapters, prompt encoder and decoder learn, the encoder stays."""

    learning_rate = 1e-4
    epochs = 50
    fine_tuning = True
    # What it segments is pointed at.
    segments_labels = False
    sam: ClassVar[SAMPreset] = SAM_PRESETS["vit_b"]
    trains_encoder: ClassVar[bool] = False

    loss: Any

    @classmethod
    def resolve(cls, configuration: dict[str, Any]) -> Resolved:
        patch = configuration.get("patch_size", ())
        if len(patch) != 2:
            raise PluginError(
                f"{cls.__name__} trains on slices, but the patch of this configuration is"
                f" {list(patch)}. Train with configuration 2d."
            )
        name = "stunet_plugin.networks.sammed2d.SAMMed2D"
        return Resolved({"network_class_name": name, "arch_kwargs": {}, "_kw_requires_import": []})

    @classmethod
    def check_input(cls, plans: dict, configuration: str, fold: int | str, dataset: dict) -> None:
        if world_size() > 1:
            raise PluginError(f"{cls.__name__} trains in one process. Leave out -num_gpus.")
        super().check_input(plans, configuration, fold, dataset)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        """Build the network for training; refuse to for prediction, which nnU-Net does without deep
        supervision."""
        from stunet_plugin.networks.sammed2d import SAMMed2D

        if not enable_deep_supervision:
            raise PluginError(
                f"A model of {cls.__name__} segments what it is shown, nothing by itself: stunet"
                " prompt MODEL_FOLDER -i IMAGE -o OUT --box X,Y,X,Y"
            )
        if num_input_channels not in IMAGE_CHANNELS:
            raise PluginError(
                f"{cls.__name__} takes images of one channel or of three (colours), this dataset"
                f" has {num_input_channels}. Make a dataset of the channel that shows most."
            )
        network: torch.nn.Module = SAMMed2D(cls.sam)
        return network

    @classmethod
    def read_pretrained(cls, file: str, network: torch.nn.Module, channels: int) -> Pretrained:
        """As for all; weights of a SAM without adapters get those of the network, which change
        nothing before they are trained."""
        from stunet_plugin.networks.sammed2d import ADAPTER

        given = super().read_pretrained(file, network, channels)
        weights = given.checkpoint["network_weights"]
        if any(ADAPTER in name for name in weights):
            return given
        own = {name: x for name, x in network.state_dict().items() if ADAPTER in name}
        checkpoint = {**given.checkpoint, "network_weights": weights | own}
        return Pretrained(checkpoint, given.tensors, "Without adapters, which start without effect")

    def initialize(self) -> None:
        # Every slice is to show an object.
        self.oversample_foreground_percent = 1.0
        self._random = np.random.default_rng(int(torch.randint(2**62, ())))
        super().initialize()

    def _do_i_compile(self) -> bool:
        return False

    def _network_strides(self) -> Strides:
        return ()

    def _get_deep_supervision_scales(self) -> None:
        return None

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        pass

    def plot_network_architecture(self) -> None:
        pass

    def _build_loss(self) -> torch.nn.Module:
        from stunet_plugin.sam.loss import SAMLoss

        return SAMLoss()

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from stunet_plugin.networks.sammed2d import ADAPTER

        encoder = self._bare_network().vision_encoder
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(self.trains_encoder or ADAPTER in name)
        return torch.optim.Adam(groups, self.initial_lr)

    def train_step(self, batch: dict) -> dict:
        from stunet_plugin.networks.sammed2d import Inputs, Prompts
        from stunet_plugin.sam import prompts as drawing

        images, targets = self._draw(batch, OBJECTS)
        first = drawing.first_prompts(targets, self._random)
        losses = [self._step(Inputs(images, None, first), targets)]
        masks_alone = (int(self._random.integers(1, CORRECTION_STEPS - 1)), CORRECTION_STEPS - 1)
        for step in range(CORRECTION_STEPS):
            latest = self.loss.latest
            given = Prompts(masks=torch.sigmoid(latest.best()[0].detach().float()))
            if step not in masks_alone:
                points = drawing.corrections(self.loss.found, targets, self._random)
                given = replace(points, masks=given.masks)
            inputs = Inputs(None, latest.embeddings.detach(), given)
            losses.append(self._step(inputs, targets))
        return {"loss": np.mean(losses)}

    def _step(self, inputs: Any, targets: Tensor) -> np.ndarray:
        loss: np.ndarray = super().train_step({"data": inputs, "target": targets})["loss"]
        return loss

    def _draw(self, batch: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, size, size) as the network takes them, and ``count`` targets of
        each (B * count, 1, size, size), on the training device."""
        from stunet_plugin.sam import images as slices
        from stunet_plugin.sam.prompts import draw_targets

        data, labels = (batch[key].to(self.device) for key in ("data", "target"))
        height, width = data.shape[2:]
        frame = slices.Frame(height, width, self.sam.image_size)
        images = frame.enter(slices.normalise(slices.slices_to_bytes(data)))
        classes, known = self._classes(labels)
        classes, ignored = (frame.enter(x.float()) > 0 for x in (classes, ~known))
        return images, draw_targets(classes, ~ignored, count, self._random)

    def _classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a mask per class or region (B, classes, H, W), and where the label is known."""
        manager = self.label_manager
        if manager.has_regions:
            regions = len(manager.foreground_regions)
            ignored = labels[:, regions:].bool().any(1, keepdim=True)
            return labels[:, :regions].bool(), ~ignored
        classes = torch.cat([labels == value for value in manager.foreground_labels], 1)
        return classes, labels != (manager.ignore_label if manager.has_ignore_label else -1)

    @cached_property
    def _names(self) -> dict[str, Any]:
        """Name to label or region of what is segmented, in nnU-Net's order."""
        kept = ("background", "ignore")
        return {name: x for name, x in self.dataset_json["labels"].items() if name not in kept}

    def validation_step(self, batch: dict) -> dict:
        """Overlaps by an exact box and after 1, 3 and 5 points, in place of nnU-Net's classes."""
        from stunet_plugin.networks.sammed2d import Inputs, Prompts
        from stunet_plugin.sam import prompts as drawing
        from stunet_plugin.sam.curve import POINTS

        images, targets = self._draw(batch, 1)
        there = (targets == 1).flatten(1).any(1)
        if bool(there.any()):
            images, targets = images[there], targets[there]
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            masks = self.network(Inputs(images, None, Prompts(boxes=drawing.boxes_of(targets))))
            loss, found = self.loss(masks, targets), [self.loss.found]
            so_far = Prompts()
            wrong = torch.zeros_like(found[0])
            for count in range(1, max(POINTS) + 1):
                new = drawing.corrections(wrong, targets, self._random, count=1)
                so_far = replace(
                    new,
                    points=_joined(so_far.points, new.points),
                    labels=_joined(so_far.labels, new.labels),
                    masks=so_far.masks,
                )
                masks = self.network(Inputs(None, masks.embeddings, so_far))
                self.loss(masks, targets)
                wrong = self.loss.found
                so_far = replace(so_far, masks=torch.sigmoid(masks.best()[0].float()))
                found += [wrong] if count in POINTS else []
        truth, known = targets == 1, targets != drawing.IGNORED
        pairs = [(one & known, truth) for one in found]
        counts = {
            "tp_hard": [(one & true).sum() for one, true in pairs],
            "fp_hard": [(one & ~true).sum() for one, true in pairs],
            "fn_hard": [(~one & true).sum() for one, true in pairs],
        }
        numbers = {key: np.array([int(x) for x in values]) for key, values in counts.items()}
        return {"loss": loss.cpu().numpy(), **numbers}

    @torch.no_grad()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Score objects in slices of the held-out cases by box and points, instead of predicting,
        which it does not do by itself."""
        from stunet_plugin.sam.curve import summarise

        self.network.eval()
        found = list(self._measure())
        if not found:
            self.print_to_log_file("No object of a held-out case is large enough to be scored.")
            return
        summary = {"trainer": type(self).__name__, "fold": self.fold, **summarise(found)}
        file = Path(self.output_folder, "validation", "interaction.json")
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(summary, indent=2))
        dice = {step: round(value, 4) for step, value in summary["mean"]["dice"].items()}
        self.logger.log_summary("final_val/dice_1_point", summary["mean"]["dice"]["1 point"])
        self.print_to_log_file(f"Mean Dice of {len(found)} objects in slices: {dice}, in {file}")

    def _measure(self) -> Iterator[dict[str, Any]]:
        from stunet_plugin.sam.curve import measure_case
        from stunet_plugin.sam.images import slices_to_bytes

        dataset = self.get_tr_and_val_datasets()[1]
        ignore = self.label_manager.ignore_label
        for case in dataset.identifiers:
            data, labels, *_ = dataset.load_case(case)
            data, labels = np.asarray(data[:]), np.asarray(labels[:])[0]
            # A slice with ignored pixels would score what is not known.
            whole = (labels != (-2 if ignore is None else ignore)).all((1, 2), keepdims=True)
            masks = {
                name: torch.from_numpy(np.isin(labels, np.atleast_1d(values)) & whole)
                for name, values in self._names.items()
            }
            images = slices_to_bytes(torch.from_numpy(data).float().transpose(0, 1))
            yield from measure_case(self._bare_network(), images, masks, self.device, case)


def _joined(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None or new is None else torch.cat((old, new), 1)


class SAMMed2DTrainer_tiny(SAMMed2DTrainer):
    """Trains all of a tiny SAM-Med2D from scratch: for tests and dry runs."""

    fine_tuning = False
    sam = SAM_PRESETS["tiny"]
    trains_encoder = True


TRAINERS = {one.__name__: one for one in (SAMMed2DTrainer, SAMMed2DTrainer_tiny)}
