"""Pretraining with Volume Fusion in nnU-Net's training loop, for the network of any trainer of this
project.

Papers and formula: ``stunet_plugin.pretraining.volume_fusion``. The optimizer is the published one
    for every network: with SGD as
STU-Net is trained on labels, the features of the decoder collapse (docs/decisions.md). Epochs,
schedule and batch size are those of the network's own trainer and plan.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.options import (
    VF_CLASSES,
    VF_LARGEST,
    VF_RATE,
    VF_SCHEME,
    VF_SMALLEST,
    VF_STANDARDISE,
    Options,
)
from stunet_plugin.pretraining.cases import check_cases_complete, check_fold, describe_cases
from stunet_plugin.pretraining.score import confusion_matrix, overlap_counts, pretext_score
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.pretraining.volume_fusion import (
    DEFAULT_SCHEME,
    PUBLISHED_CLASSES,
    SCHEMES,
    VolumeFusion,
)
from stunet_plugin.trainers.misfm_optimizer import MISFMOptimizer
from stunet_plugin.utils.figures import save_fusion_example, save_pretext_progress
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.weights.pretrained import RECORD, read_checkpoint

SCORE_EPOCHS = 10
"""The score at the end is over this many epochs' worth of validation batches."""
EXAMPLE_SAMPLES = 4
SCORE_FILE = "pretext_score.json"


class VolumeFusionMixin(MISFMOptimizer):
    """Trains a network to tell fusion classes instead of labels; stands before the network's
    trainer among the bases.

    Attributes:
        segmentation_trainer: the trainer that fine-tunes what this one pretrained.
    """

    segmentation_trainer: ClassVar[str]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        options = Options()
        self.fusion = fusion_from(options)
        super().__init__(
            plans, configuration, fold, pretext_dataset(dataset_json, self.fusion), device
        )
        self.initial_lr = options.fraction(VF_RATE, self.initial_lr)
        # From the global generator, which STUNET_SEED seeds; processes of one training draw
        # differently.
        self._fusion_draws = torch.Generator().manual_seed(
            int(torch.randint(2**62, ())) + self.local_rank
        )
        self._example: dict[str, Any] | None = None

    # --- the network

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
        if not enable_deep_supervision:
            raise PluginError(
                f"This model was pretrained with Volume Fusion ({cls.__name__}): it tells how two"
                " scans were blended and knows no anatomy, so its predictions would mean nothing."
                " Fine-tune it on labelled cases and predict with that: nnUNetv2_train DATASET"
                f" CONFIGURATION FOLD -tr {cls.segmentation_trainer} -pretrained_weights"
                f" .../{cls.__name__}__.../fold_.../checkpoint_final.pth"
            )
        return super().build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )

    def _build_loss(self) -> torch.nn.Module:
        """The network trainer's loss; class 0 counts in the Dice, since here it is a class like the
        others."""
        loss = super()._build_loss()
        dice: Any = (loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss).dc
        getattr(dice, "_orig_mod", dice).do_bg = True
        return loss

    # --- data

    def get_dataloaders(self) -> tuple[Any, Any]:
        # nnU-Net stores these in the checkpoint; no prediction follows, but its reader wants them
        # there.
        self.inference_allowed_mirroring_axes = tuple(
            range(len(self.configuration_manager.patch_size))
        )
        train, validation = self.get_tr_and_val_datasets()
        processes = get_allowed_n_proc_DA()
        return self._load(train, processes, cached=6), self._load(
            validation, processes // 2, cached=3
        )

    def _load(self, dataset: nnUNetBaseDataset, processes: int, cached: int) -> Any:
        """Load sub-volumes of a dataset, in background processes unless nnU-Net is told to use
        none."""
        loader = SubVolumeLoader(dataset, self.batch_size, self.configuration_manager.patch_size)
        if get_allowed_n_proc_DA() == 0:
            batches = SingleThreadedAugmenter(loader, None)
        else:
            batches = NonDetMultiThreadedAugmenter(
                loader,
                None,
                max(processes, 1),
                num_cached=max(cached, processes // 2),
                pin_memory=self.device.type == "cuda",
                wait_time=0.002,
            )
        next(batches)  # starts the processes
        return batches

    @torch.no_grad()
    def _fuse(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of sub-volumes into one of fused images and class maps, one per output, on
        the training device."""
        foreground, background = batch["data"].to(self.device, non_blocking=True).chunk(2)
        image, class_map = self.fusion(foreground, background, self._fusion_draws)
        scales = self._get_deep_supervision_scales()
        if scales is None:
            return {"data": image, "target": class_map[:, None]}
        # Samples stand where that transform has channels, which it treats alike.
        targets = DownsampleSegForDSTransform(scales)(segmentation=class_map)["segmentation"]
        return {"data": image, "target": [target[:, None] for target in targets]}

    # --- training and validation

    def on_train_start(self) -> None:
        super().on_train_start()
        for line in describe_cases(
            Path(self.preprocessed_dataset_folder), self.fold, self.dataset_json.get("numTraining")
        ):
            self.print_to_log_file(line)
        smallest, largest = self.fusion.scheme.size_range(self.configuration_manager.patch_size)
        self.print_to_log_file(
            f"Volume Fusion: alpha {', '.join(self.fusion.class_names())}; {self.fusion.scheme}"
        )
        self.print_to_log_file(
            f"Blocks of {smallest} to {largest} voxels in patches of"
            f" {self.configuration_manager.patch_size}"
        )
        self._example = self._fuse(next(self.dataloader_val))
        self._save_example()

    def train_step(self, batch: dict) -> dict:
        return super().train_step(self._fuse(batch))

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's, with class 0 counted like the others."""
        loss, confusion = self._validate(batch)
        hits, false_positives, misses = overlap_counts(confusion)
        return {"loss": loss, "tp_hard": hits, "fp_hard": false_positives, "fn_hard": misses}

    def _validate(self, batch: dict[str, Any]) -> tuple[np.ndarray, torch.Tensor]:
        fused = self._fuse(batch)
        with self._autocast():
            outputs = self.network(fused["data"])
            loss = self.loss(outputs, fused["target"])
        return loss.cpu().numpy(), confusion_matrix(
            _full_resolution(outputs), _full_resolution(fused["target"])[:, 0]
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """As in nnU-Net's steps: half precision on CUDA alone."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def on_epoch_end(self) -> None:
        names = self.fusion.class_names()
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        self.print_to_log_file(
            "Pretext Dice",
            {name: round(float(value), 4) for name, value in zip(names, dice, strict=True)},
        )
        super().on_epoch_end()
        if self.local_rank == 0:
            # In place of nnU-Net's own, which shows the mean alone.
            save_pretext_progress(
                self.logger.get_checkpoint(), names, Path(self.output_folder, "progress.png")
            )
        if self.current_epoch % self.save_every == 0 or self.current_epoch == self.num_epochs:
            self._save_example()

    @torch.no_grad()
    def _save_example(self) -> None:
        """Show what the network makes of the same few samples throughout a training."""
        # A sharded network is gathered for a forward pass, in which all processes take part.
        if self._example is None or (self.local_rank != 0 and not self.sharded):
            return
        self.network.eval()
        images = self._example["data"][:EXAMPLE_SAMPLES]
        with self._autocast():
            # The bare network: another process of the training would wait for this one in DDP's.
            predictions = _full_resolution(self._bare_network()(images)).argmax(1)
        if self.local_rank != 0:
            return
        targets = _full_resolution(self._example["target"])[:EXAMPLE_SAMPLES, 0]
        path = Path(self.output_folder, f"volume_fusion_epoch_{self.current_epoch:04d}.png")
        save_fusion_example(
            images[:, 0].cpu().numpy(),
            targets.cpu().numpy(),
            predictions.cpu().numpy(),
            self.fusion.class_names(),
            path,
        )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Score the pretext task over many draws; there is nothing that a sliding window could
        segment."""
        self.network.eval()
        self.set_deep_supervision_enabled(True)
        dataset = self.get_tr_and_val_datasets()[1]
        batches = self._load(dataset, get_allowed_n_proc_DA(), cached=6)
        with torch.no_grad():
            counts = [
                self._validate(next(batches))[1]
                for _ in range(SCORE_EPOCHS * self.num_val_iterations_per_epoch)
            ]
        if isinstance(batches, NonDetMultiThreadedAugmenter):
            batches._finish()
        if self.is_ddp:
            everybody: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everybody, counts)
            counts = [confusion for process in everybody for confusion in process]
        if self.local_rank != 0:
            return
        score = {
            "trainer": type(self).__name__,
            "epochs": self.current_epoch,
            "cases": len(dataset.identifiers),
            "held_out": self.fold != "all",
            RECORD: describe_fusion(self.fusion),
            **pretext_score(counts, self.fusion.class_names()),
        }
        folder = Path(self.output_folder, "validation")
        folder.mkdir(exist_ok=True)
        write_atomically(folder / SCORE_FILE, json.dumps(score, indent=2))
        self.logger.log_summary("final_val/pretext_dice", score["mean_dice"])
        kind = (
            "held-out cases"
            if score["held_out"]
            else "the training cases (fold all holds none out)"
        )
        self.print_to_log_file(
            f"Pretext Dice on {kind}: {score['mean_dice']:.4f}, written to {folder / SCORE_FILE}"
        )

    # --- checks

    @classmethod
    def _check_before_anything_is_written(
        cls, plans: dict, configuration: str, dataset_json: dict
    ) -> None:
        super()._check_before_anything_is_written(plans, configuration, dataset_json)
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        if chosen.previous_stage_name is not None:
            raise PluginError(
                f"{configuration} is the second stage of a cascade: its network also takes the"
                " first stage's segmentation, which unlabelled scans do not have. Pretrain"
                f" {chosen.previous_stage_name} or 3d_fullres."
            )
        fusion_from(Options()).scheme.size_range(chosen.patch_size)
        check_cases_complete(
            Path(nnUNet_preprocessed, manager.dataset_name, chosen.data_identifier)
        )

    @classmethod
    def _check_fold(cls, plans: dict, configuration: str, fold: int | str) -> None:
        manager = PlansManager(plans)
        folder = Path(
            nnUNet_preprocessed,
            manager.dataset_name,
            manager.get_configuration(configuration).data_identifier,
        )
        check_fold(
            folder,
            fold,
            f"nnUNetv2_train {manager.dataset_name} {configuration} all -tr {cls.__name__}",
        )

    def _check_checkpoint_to_continue(self, file: str) -> None:
        dataset_json = (
            read_checkpoint(file, "The checkpoint to continue from,")
            .get("init_args", {})
            .get("dataset_json", {})
        )
        was, now = dataset_json.get(RECORD), describe_fusion(self.fusion)
        if was is not None and was != now:
            changed = ", ".join(
                f"{key} {was.get(key)}, now {value}"
                for key, value in now.items()
                if was.get(key) != value
            )
            raise PluginError(
                f"Cannot continue from {file}: that training had {changed}. Set the STUNET_VF_"
                " options as they were."
            )
        super()._check_checkpoint_to_continue(file)


def fusion_from(options: Options) -> VolumeFusion:
    """Return the fusion that the options ask for, as published where they are silent."""
    published: Any = SCHEMES[options.whole(VF_SCHEME, DEFAULT_SCHEME)]
    scheme = dataclasses.replace(
        published,
        smallest=options.fraction(VF_SMALLEST, published.smallest),
        largest=options.fraction(VF_LARGEST, published.largest),
    )
    return VolumeFusion(
        classes=options.whole(VF_CLASSES, PUBLISHED_CLASSES),
        scheme=scheme,
        standardise=bool(options.whole(VF_STANDARDISE, 0)),
    )


def describe_fusion(fusion: VolumeFusion) -> dict[str, Any]:
    """Return the numbers of a fusion for JSON."""
    return {**dataclasses.asdict(fusion), "blocks": type(fusion.scheme).__name__}


def pretext_dataset(dataset_json: dict[str, Any], fusion: VolumeFusion) -> dict[str, Any]:
    """Return a dataset's description with the fusion classes in place of its labels, regions and
    ignore label."""
    names = fusion.class_names()
    labels = {
        "background": 0,
        **{f"alpha {name}": value for value, name in enumerate(names) if value},
    }
    kept = {key: value for key, value in dataset_json.items() if key != "regions_class_order"}
    return {**kept, "labels": labels, RECORD: describe_fusion(fusion)}


def _full_resolution(per_output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    return per_output if isinstance(per_output, torch.Tensor) else per_output[0]
