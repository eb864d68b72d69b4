"""Volume Fusion pretraining in nnU-Net's training, for the network of any trainer of this project.

Papers and formula: ``stunet_plugin.pretraining.volume_fusion``. The optimizer is the published one
for every network: with the SGD of STU-Net the decoder's features collapse (docs/decisions.md).
Epochs, schedule and batch size are those of the network's own trainer and plan.
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
from torch import Tensor, distributed

from stunet_plugin import options as names
from stunet_plugin.errors import PluginError
from stunet_plugin.options import Options
from stunet_plugin.pretraining.cases import check_cases_complete, check_fold, describe_cases
from stunet_plugin.pretraining.figures import save_fusion_example, save_pretext_progress
from stunet_plugin.pretraining.score import (
    confusion_matrix,
    overlap_counts,
    pretext_score,
    unlearned_classes,
)
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.pretraining.volume_fusion import (
    DEFAULT_SCHEME,
    PUBLISHED_CLASSES,
    SCHEMES,
    VolumeFusion,
)
from stunet_plugin.trainers.misfm_trainers import MISFMOptimizer
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY, read_checkpoint

SCORE_EPOCHS = 10
"""The final score is over this many epochs' worth of validation batches."""
EXAMPLE_SAMPLES = 4
SCORE_FILE = "pretext_score.json"


class VolumeFusionMixin(MISFMOptimizer):
    """Trains a network on fusion classes instead of labels; comes before the network's trainer
    among the bases.

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
        description = pretext_dataset(dataset_json, self.fusion)
        super().__init__(plans, configuration, fold, description, device)
        self.initial_lr = options.fraction(names.VF_RATE, self.initial_lr)
        # STUNET_SEED seeds the global generator; the processes of a training draw differently.
        seed = int(torch.randint(2**62, ())) + self.local_rank
        self._fusion_draws = torch.Generator().manual_seed(seed)
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
                f"This model was pretrained with Volume Fusion ({cls.__name__}): it predicts how"
                " two scans were blended, not anatomy. Fine-tune it on labelled cases and predict"
                " with that: nnUNetv2_train DATASET CONFIGURATION FOLD -tr"
                f" {cls.segmentation_trainer} -pretrained_weights"
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
        """The network trainer's loss; class 0 counts in the Dice like the others."""
        loss = super()._build_loss()
        dice: Any = (loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss).dc
        getattr(dice, "_orig_mod", dice).do_bg = True
        return loss

    # --- data

    def get_dataloaders(self) -> tuple[Any, Any]:
        # nnU-Net stores these in the checkpoint.
        axes = range(len(self.configuration_manager.patch_size))
        self.inference_allowed_mirroring_axes = tuple(axes)
        train, validation = self.get_tr_and_val_datasets()
        processes = get_allowed_n_proc_DA()
        return (
            self._load(train, processes, cached=6),
            self._load(validation, processes // 2, cached=3),
        )

    def _load(self, dataset: nnUNetBaseDataset, processes: int, cached: int) -> Any:
        """Load sub-volumes, in background processes unless nnU-Net is told to use none."""
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
        """Turn a batch of sub-volumes (2 * samples, channel, *patch) into fused images (sample,
        channel, *patch) and class maps, one per output, on the training device."""
        foreground, background = batch["data"].to(self.device, non_blocking=True).chunk(2)
        image, class_map = self.fusion(foreground, background, self._fusion_draws)
        scales = self._get_deep_supervision_scales()
        if scales is None:
            return {"data": image, "target": class_map[:, None]}
        # Samples take the place of that transform's channels, which it treats alike.
        targets = DownsampleSegForDSTransform(scales)(segmentation=class_map)["segmentation"]
        return {"data": image, "target": [target[:, None] for target in targets]}

    # --- training and validation

    def on_train_start(self) -> None:
        super().on_train_start()
        patch_size = self.configuration_manager.patch_size
        smallest, largest = self.fusion.scheme.size_range(patch_size)
        folder = Path(self.preprocessed_dataset_folder)
        for line in (
            *describe_cases(folder, self.fold, self.dataset_json.get("numTraining")),
            f"Volume Fusion: alpha {', '.join(self.fusion.class_names())}; {self.fusion.scheme}",
            f"Blocks of {smallest} to {largest} voxels in patches of {patch_size}",
        ):
            self.print_to_log_file(line)
        self._example = self._fuse(next(self.dataloader_val))
        self._save_example()

    def train_step(self, batch: dict) -> dict:
        return super().train_step(self._fuse(batch))

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's, with class 0 counted like the others."""
        loss, confusion = self._validate(batch)
        hits, false_positives, misses = overlap_counts(confusion)
        return {"loss": loss, "tp_hard": hits, "fp_hard": false_positives, "fn_hard": misses}

    def _validate(self, batch: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
        fused = self._fuse(batch)
        with self._autocast():
            outputs = self.network(fused["data"])
            loss = self.loss(outputs, fused["target"])
        target = _full_resolution(fused["target"])[:, 0]
        return loss.cpu().numpy(), confusion_matrix(_full_resolution(outputs), target)

    def _autocast(self) -> AbstractContextManager[Any]:
        """As in nnU-Net's steps: half precision on CUDA only."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def on_epoch_end(self) -> None:
        alphas = self.fusion.class_names()
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        rounded = {alpha: round(float(value), 4) for alpha, value in zip(alphas, dice, strict=True)}
        self.print_to_log_file("Pretext Dice", rounded)
        super().on_epoch_end()
        if self.local_rank == 0:
            # In place of nnU-Net's own, which shows the mean only.
            file = Path(self.output_folder, "progress.png")
            save_pretext_progress(self.logger.get_checkpoint(), alphas, file)
        if self.current_epoch % self.save_every == 0 or self.current_epoch == self.num_epochs:
            self._save_example()

    @torch.no_grad()
    def _save_example(self) -> None:
        """Write what the network predicts on the same few samples throughout a training."""
        # All processes take part in a forward pass of a sharded network.
        if self._example is None or (self.local_rank != 0 and not self.sharded):
            return
        self.network.eval()
        images = self._example["data"][:EXAMPLE_SAMPLES]
        with self._autocast():
            # The bare network: in DDP's forward pass this process would wait for the others.
            predictions = _full_resolution(self._bare_network()(images)).argmax(1)
        if self.local_rank == 0:
            targets = _full_resolution(self._example["target"])[:EXAMPLE_SAMPLES, 0]
            file = f"volume_fusion_epoch_{self.current_epoch:04d}.png"
            save_fusion_example(
                images[:, 0].cpu().numpy(),
                targets.cpu().numpy(),
                predictions.cpu().numpy(),
                self.fusion.class_names(),
                Path(self.output_folder, file),
            )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Score the pretext task over many draws; there is no segmentation to score."""
        self.network.eval()
        self.set_deep_supervision_enabled(True)
        dataset = self.get_tr_and_val_datasets()[1]
        batches = self._load(dataset, get_allowed_n_proc_DA(), cached=6)
        draws = range(SCORE_EPOCHS * self.num_val_iterations_per_epoch)
        with torch.no_grad():
            counts = [self._validate(next(batches))[1] for _ in draws]
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
            VOLUME_FUSION_ENTRY: describe_fusion(self.fusion),
            **pretext_score(counts, self.fusion.class_names()),
        }
        file = Path(self.output_folder, "validation", SCORE_FILE)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(score, indent=2))
        self.logger.log_summary("final_val/pretext_dice", score["mean_dice"])
        kind = "held-out cases" if score["held_out"] else "the training cases (fold all)"
        self.print_to_log_file(
            f"Pretext Dice on {kind}: {score['mean_dice']:.4f}, written to {file}"
        )
        unlearned = unlearned_classes(score["dice_per_alpha"])
        if unlearned:
            self.print_banner(
                f"Volume Fusion has not learned its task: Dice near 0 for alpha {unlearned}. These"
                " weights may be no better than\nrandom ones. Is the loss in progress.png still"
                " falling? Then train longer: raise STUNET_EPOCHS and run the same\ncommand with"
                " --c. Otherwise look at volume_fusion_epoch_*.png for images without contrast,"
                " or lower STUNET_VF_RATE\nand start again."
            )

    # --- checks

    @classmethod
    def check_input(
        cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict
    ) -> None:
        super().check_input(plans, configuration, fold, dataset_json)
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        if chosen.previous_stage_name is not None:
            raise PluginError(
                f"{configuration} is the second stage of a cascade: its network also takes the"
                " first stage's segmentation, which unlabelled scans do not have. Pretrain"
                f" {chosen.previous_stage_name} or 3d_fullres."
            )
        fusion_from(Options()).scheme.size_range(chosen.patch_size)
        folder = Path(nnUNet_preprocessed, manager.dataset_name, chosen.data_identifier)
        check_cases_complete(folder)
        train_on_all = f"nnUNetv2_train {manager.dataset_name} {configuration} all"
        check_fold(folder, fold, f"{train_on_all} -tr {cls.__name__}")

    def check_resumable(self, file: str) -> None:
        arguments = read_checkpoint(file, "The checkpoint to resume from,").get("init_args", {})
        was = arguments.get("dataset_json", {}).get(VOLUME_FUSION_ENTRY)
        now = describe_fusion(self.fusion)
        if was is not None and was != now:
            changed = ", ".join(
                f"{key} {was.get(key)}, now {value}"
                for key, value in now.items()
                if was.get(key) != value
            )
            raise PluginError(
                f"Cannot resume from {file}: that training had {changed}. Set the STUNET_VF_"
                " options as they were."
            )
        super().check_resumable(file)


def fusion_from(options: Options) -> VolumeFusion:
    """Return the fusion that the options ask for; as published where they are not set."""
    published: Any = SCHEMES[options.whole(names.VF_SCHEME, DEFAULT_SCHEME)]
    scheme = dataclasses.replace(
        published,
        smallest=options.fraction(names.VF_SMALLEST, published.smallest),
        largest=options.fraction(names.VF_LARGEST, published.largest),
    )
    classes = options.whole(names.VF_CLASSES, PUBLISHED_CLASSES)
    return VolumeFusion(classes, scheme, standardise=bool(options.whole(names.VF_STANDARDISE, 0)))


def describe_fusion(fusion: VolumeFusion) -> dict[str, Any]:
    """Return the numbers of a fusion for JSON."""
    return {**dataclasses.asdict(fusion), "blocks": type(fusion.scheme).__name__}


def pretext_dataset(dataset_json: dict[str, Any], fusion: VolumeFusion) -> dict[str, Any]:
    """Return a dataset's description with the fusion classes as its only labels."""
    alphas = fusion.class_names()
    labels = {"background": 0, **{f"alpha {alphas[k]}": k for k in range(1, len(alphas))}}
    kept = {key: value for key, value in dataset_json.items() if key != "regions_class_order"}
    return {**kept, "labels": labels, VOLUME_FUSION_ENTRY: describe_fusion(fusion)}


def _full_resolution(per_output: Tensor | Sequence[Tensor]) -> Tensor:
    return per_output if isinstance(per_output, Tensor) else per_output[0]
