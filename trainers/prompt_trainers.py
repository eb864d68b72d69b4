"""PromptTrainer for the plan's network, ``PromptTrainer_STUNet_base`` etc. for STU-Net: they train
a network that segments what a user points at (docs/prompts.md). ``_ft`` starts from weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, distributed
from torch.nn import functional

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.prompts import curve
from stunet_plugin.prompts.channels import CHANNELS, ENTRY, OUTPUTS, radii_for
from stunet_plugin.prompts.network import take_images_alone, widen_stem
from stunet_plugin.prompts.simulation import IGNORED, Simulator
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.planned_trainers import TRAINERS as PLANNED
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.weights.pretrained import Pretrained

STAGES = ("box", "1 click", "3 clicks", "5 clicks")
"""What the Dice of an epoch is given for, in place of nnU-Net's classes."""
FLAT_RATIO = 3.0
"""Slices that are this many times farther apart than voxels within them are looked at one by one,
as in nnU-Net's augmentation."""
NO_RESAMPLING = "no_resampling_hack"


class PromptMixin(PluginTrainer):
    """Trains a network on prompts that are simulated from the labels; comes before the network's
    trainer among the bases.

    nnU-Net sees a dataset of two classes, background and object; ``classes`` is what the labels
    really are.
    """

    # What the heads tell apart are no classes of the dataset.
    segments_labels = False
    classes: LabelManager
    simulator: Simulator

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.classes = self.plans_manager.get_label_manager(_labelled(self.dataset_json))

    def plans_to_record(self, plans: dict, configuration: str) -> dict:
        recorded = super().plans_to_record(plans, configuration)
        chosen = PlansManager(plans).get_configuration(configuration)
        # What is drawn for a click is a part of the model.
        self._entry["radii"] = list(_radii(chosen))
        return recorded

    def dataset_to_record(self, dataset_json: dict) -> dict:
        labels: dict[str, Any] = {"background": 0, "object": 1}
        if "ignore" in dataset_json["labels"]:
            labels["ignore"] = IGNORED
        kept = {x: dataset_json[x] for x in ("labels", "regions_class_order") if x in dataset_json}
        self._entry: dict[str, Any] = dict(dataset_json.get(ENTRY) or kept)
        dataset = {**dataset_json, "labels": labels, ENTRY: self._entry}
        dataset.pop("regions_class_order", None)
        return dataset

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        """Build the network with prompt channels and two outputs, whatever the labels."""
        network = super().build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels + CHANNELS,
            OUTPUTS,
            enable_deep_supervision,
        )
        return take_images_alone(network, num_input_channels)

    @classmethod
    def read_pretrained(cls, file: str, network: torch.nn.Module, channels: int) -> Pretrained:
        return widen_stem(super().read_pretrained(file, network, channels), network, channels)

    def initialize(self) -> None:
        super().initialize()
        # STUNET_SEED seeds the global generator; the processes of a training draw differently, but
        # a sharded network needs as many passes in each.
        seed = int(torch.randint(2**62, ())) + self.local_rank
        chosen = self.configuration_manager
        self.simulator = Simulator(np.random.default_rng(seed), _radii(chosen), _is_flat(chosen))
        self._schedule = np.random.default_rng(0)

    def _build_loss(self) -> torch.nn.Module:
        # Samples show different objects, whose overlap says nothing together.
        chosen = {**self.configuration_manager.configuration, "batch_dice": False}
        with self._temporarily(configuration_manager=ConfigurationManager(chosen)):
            return super()._build_loss()

    def get_dataloaders(self) -> tuple[Any, Any]:
        with self._temporarily(label_manager=self.classes):
            loaders: tuple[Any, Any] = super().get_dataloaders()
        return loaders

    def train_step(self, batch: dict) -> dict:
        recipe = self.simulator.recipe
        corrected = self._schedule.random() < recipe.corrected
        low, high = recipe.corrections
        count = int(self._schedule.integers(low, high + 1)) if corrected else 0
        return super().train_step(self.simulate(batch, count))

    @torch.no_grad()
    def simulate(self, batch: Mapping[str, Any], corrections: int) -> dict[str, Any]:
        """Return a batch of nnU-Net's with an object and prompts for each sample, some of them
        corrections of what the network makes of the ones before."""
        images, labels = self._on_device(batch)
        inputs, targets, with_prompts = [], [], []
        for image, label in zip(images, labels, strict=True):
            image, label = self.simulator.zoom_out(image, label)
            classes, ignored = self._masks(label)
            chosen, channels, kind = self.simulator.choose(classes)
            inputs.append(torch.cat((image, channels)))
            targets.append(torch.where(ignored, IGNORED, chosen.to(torch.int16)))
            with_prompts.append(kind != "none")
        x, target = torch.stack(inputs), torch.stack(targets)
        for _ in range(corrections):
            predicted = self._predict(x)
            for number, prompted in enumerate(with_prompts):
                if prompted:
                    channels = x[number, -CHANNELS:]
                    self.simulator.correct(channels, target[number], predicted[number])
        shapes = [tuple(one.shape[2:]) for one in batch["target"]]
        outputs = [_resized(target[:, None], (1,) * (3 - len(shape)) + shape) for shape in shapes]
        return {"data": self._squeezed(x), "target": [self._squeezed(one) for one in outputs]}

    def _on_device(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and full-resolution targets of a batch, both with three spatial axes."""
        both = batch["data"], batch["target"][0]
        images, labels = (x.to(self.device, non_blocking=True) for x in both)
        if images.ndim == 4:
            images, labels = images[:, :, None], labels[:, :, None]
        return images, labels

    def _squeezed(self, x: Tensor) -> Tensor:
        """Return a batch with as many spatial axes as the network has."""
        return x if len(self.configuration_manager.patch_size) == 3 else x[:, :, 0]

    def _masks(self, label: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return a mask (three axes) of each class or region in a target of nnU-Net's (channel,
        *spatial), and where it is to be ignored."""
        ignore = self.classes.ignore_label
        if self.classes.has_regions:
            count = len(self.classes.foreground_regions)
            masks = list(label[:count] > 0)
            ignored = label[count] > 0 if ignore is not None else torch.zeros_like(masks[0])
            return [mask & ~ignored for mask in masks], ignored
        ignored = label[0] == ignore if ignore is not None else torch.zeros_like(label[0]) > 0
        return [label[0] == value for value in self.classes.foreground_labels], ignored

    def _predict(self, x: Tensor) -> Tensor:
        """Return the network's masks (sample, *three axes) for images and prompts."""
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            logits = self.network(self._squeezed(x))[0]
        output = logits[:, 1] > logits[:, 0]  # argmax is slow on a CPU
        return output if output.ndim == 4 else output[:, None]

    @torch.no_grad()
    def validation_step(self, batch: dict) -> dict:
        """Count hits and errors with a box, and after clicks each in the middle of the errors so
        far; the loss is that of simulated first prompts."""
        simulated = self.simulate(batch, 0)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            loss = self.loss(self.network(simulated["data"]), simulated["target"])
        images, labels = self._on_device(batch)
        targets, kept = [], []
        for image, label in zip(images, labels, strict=True):
            classes, ignored = self._masks(label)
            there = [mask for mask in classes if mask.any()] or classes[:1]
            chosen = there[int(self.simulator.random.integers(len(there)))]
            targets.append(torch.where(ignored, IGNORED, chosen.to(torch.int16)))
            kept.append(image)
        counts = self._interact(torch.stack(kept), torch.stack(targets))
        hits, excess, missed = np.array(counts).T
        return {
            "loss": loss.detach().cpu().numpy(),
            "tp_hard": hits,
            "fp_hard": excess,
            "fn_hard": missed,
        }

    def _interact(self, images: Tensor, targets: Tensor) -> list[list[float]]:
        """Return hits, excess and missed voxels of a batch for each of STAGES."""
        first = [
            torch.stack([self.simulator.first(x, y) for y in targets]) for x in ("box", "point")
        ]
        counts = [_counts(self._predict(torch.cat((images, first[0]), 1)), targets)]
        x = torch.cat((images, first[1]), 1)
        for clicks in range(1, 6):
            predicted = self._predict(x)
            if f"{clicks} click" in " ".join(STAGES):
                counts.append(_counts(predicted, targets))
            for number, target in enumerate(targets):
                self.simulator.click(x[number, -CHANNELS:], target, predicted[number])
        return counts

    def on_epoch_end(self) -> None:
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        found = ", ".join(f"{x} {float(y):.4f}" for x, y in zip(STAGES, dice, strict=True))
        self.print_to_log_file(f"Dice with prompts: {found}")
        super().on_epoch_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Write the interaction curve of the validation cases. nnU-Net's own validation gives no
        prompts, and would compare what comes of that with the first class."""
        self.optimizer.zero_grad(set_to_none=True)
        network: Any = self._whole_network() if self.sharded else self._bare_network()
        network.decoder.deep_supervision = False
        network.eval()
        _, cases = self.do_split()
        cases = curve.spread(sorted(cases))
        dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
        mine = cases[self.local_rank :: distributed.get_world_size() if self.is_ddp else 1]
        how = self.configuration_manager, self.simulator.radii, self.device
        objects = []
        for case in mine:
            data, label, *_ = dataset.load_case(case)
            volume = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
            masks = self._named_masks(torch.from_numpy(np.asarray(label[0])))
            objects += curve.measure_case(network, volume, masks, *how, case)
            self.print_to_log_file(f"interaction curve: {case}")
        if self.is_ddp:
            everybody: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everybody, objects)
            objects = [one for process in everybody for one in process]
        network.decoder.deep_supervision = True
        if self.local_rank == 0:
            self._write_curve(objects)

    def _named_masks(self, label: Tensor) -> dict[str, Tensor]:
        """Return the mask of each class or region in a label map, by its name."""
        named = {
            x: y for x, y in self._entry["labels"].items() if x not in ("background", "ignore")
        }
        return {
            name: torch.isin(label, torch.tensor(values).to(label.dtype))
            for name, values in named.items()
        }

    def _write_curve(self, objects: Sequence[Mapping[str, Any]]) -> None:
        folder = Path(self.output_folder, "validation")
        folder.mkdir(exist_ok=True)
        found = curve.summarise(objects)
        found["automatic"] = curve.automatic_models(Path(self.output_folder), self._entry["labels"])
        found |= {"trainer": type(self).__name__, "epochs": self.current_epoch}
        file = folder / "interaction_curve.json"
        write_atomically(file, json.dumps(found, indent=2))
        curve.save_curve(found, folder / "interaction_curve.png")
        for name, value in found["mean"]["dice"].items():
            self.logger.log_summary(f"final_val/{name.replace(' ', '_')}_dice", value)
        steps = ", ".join(f"{x} {y:.4f}" for x, y in found["mean"]["dice"].items())
        self.print_to_log_file(f"Interaction curve (mean Dice): {steps}; in {file}")

    @classmethod
    def check_input(cls, plans: dict, configuration: str, fold: int | str, dataset: dict) -> None:
        super().check_input(plans, configuration, fold, dataset)
        if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
            raise PluginError(
                f"{configuration} is the second stage of a cascade; a promptable model has a mask"
                " channel of its own. Train 3d_fullres."
            )


def _labelled(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded dataset with the labels of the images."""
    return {**dataset, **{x: y for x, y in dataset[ENTRY].items() if x != "radii"}}


def _radii(configuration: ConfigurationManager) -> tuple[int, int, int]:
    chosen = configuration.configuration
    return radii_for(chosen["spacing"], chosen.get("resampling_fn_data") != NO_RESAMPLING)


def _is_flat(configuration: ConfigurationManager) -> bool:
    spacing, patch = configuration.spacing, configuration.patch_size
    return len(patch) == 2 or spacing[0] > FLAT_RATIO * max(spacing[1:])


def _resized(target: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a target (sample, 1, *spatial) in a lower resolution, as nnU-Net makes it."""
    if tuple(target.shape[2:]) == tuple(shape):
        return target
    return functional.interpolate(target.float(), size=list(shape), mode="nearest-exact").short()


def _counts(predicted: Tensor, targets: Tensor) -> list[float]:
    """Return hits, excess and missed voxels of masks."""
    valid, there = targets != IGNORED, targets == 1
    pairs = (predicted & there, predicted & ~there & valid, ~predicted & there)
    return [float(x.sum()) for x in pairs]


NETWORKS: dict[str, dict[str, type[PluginTrainer]]] = {
    "PromptTrainer": {"": PLANNED["PlannedTrainer"], "_ft": PLANNED["PlannedTrainer_ft"]},
    **{
        f"PromptTrainer_STUNet_{size}": {
            suffix: STUNET[f"STUNetTrainer_{size}{suffix}"] for suffix in ("", "_ft")
        }
        for size in PRESETS
    },
}
"""By the trainer's name without and with ``_ft``: the trainer of the network."""


def _make_trainer(name: str, network: type[PluginTrainer]) -> type[PromptMixin]:
    start = "from pretrained weights" if network.fine_tuning else "from scratch"
    attributes = {
        "__doc__": f"Trains the network of {network.__name__} to follow prompts, {start}.",
        "__module__": __name__,
    }
    return type(name, (PromptMixin, network), attributes)


TRAINERS = {
    f"{name}{suffix}": _make_trainer(f"{name}{suffix}", network)
    for name, networks in NETWORKS.items()
    for suffix, network in networks.items()
}
globals().update(TRAINERS)
