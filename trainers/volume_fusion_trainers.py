"""VolumeFusionTrainer for the plan's network, ``VolumeFusionTrainer_STUNet_base`` etc. for those of
this project: the published optimizer (docs/decisions.md), epochs of the network's own trainer."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property, partial
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
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, distributed

from stunet_plugin import options as names
from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.options import Options
from stunet_plugin.pretraining import cases, figures, score
from stunet_plugin.pretraining import volume_fusion as fusing
from stunet_plugin.pretraining.subvolumes import SubVolumeLoader
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.trainers.misfm_trainers import TRAINERS as MISFM
from stunet_plugin.trainers.misfm_trainers import MISFMOptimizer
from stunet_plugin.trainers.planned_trainers import PlannedTrainer
from stunet_plugin.trainers.safe_trainer import FINAL, write_whole
from stunet_plugin.trainers.stunet_trainers import TRAINERS as STUNET
from stunet_plugin.utils.files import write_atomically
from stunet_plugin.weights import nnssl
from stunet_plugin.weights.pretrained import VOLUME_FUSION_ENTRY, read_checkpoint

SCORE_EPOCHS = 10
"""The final score is over this many epochs' worth of validation batches."""
EXAMPLE_SAMPLES = 4


class VolumeFusionMixin(MISFMOptimizer):
    """Trains a network on fusion classes instead of labels; comes before the network's trainer
    among the bases. ``segmentation_trainer`` fine-tunes what this one pretrained."""

    segments_labels = False
    segmentation_trainer: ClassVar[str]
    _example: dict[str, Any] | None = None

    @cached_property
    def fusion(self) -> fusing.VolumeFusion:
        return fusion_from(self._options)

    def dataset_to_record(self, dataset_json: dict) -> dict:
        alphas = self.fusion.class_names()
        labels = {"background": 0, **{f"alpha {alphas[k]}": k for k in range(1, len(alphas))}}
        dataset = {**dataset_json, "labels": labels, VOLUME_FUSION_ENTRY: self._describe_fusion()}
        dataset.pop("regions_class_order", None)
        return dataset

    def initialize(self) -> None:
        self.initial_lr = self._options.fraction(names.VF_RATE, self.initial_lr)
        # STUNET_SEED seeds the global generator; the processes of a training draw differently.
        seed = int(torch.randint(2**62, ())) + self.local_rank
        self._fusion_draws = np.random.default_rng(seed)
        super().initialize()

    def _describe_fusion(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.fusion), "blocks": type(self.fusion.scheme).__name__}

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
                f"This model was pretrained with Volume Fusion ({cls.__name__}), not to predict"
                " anatomy. Fine-tune it on labelled cases: nnUNetv2_train DATASET CONFIGURATION"
                f" FOLD -tr {cls.segmentation_trainer} -pretrained_weights .../checkpoint_final.pth"
            )
        return super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, True
        )

    def _build_loss(self) -> torch.nn.Module:
        """The network trainer's loss; class 0 counts in the Dice like the others."""
        loss = super()._build_loss()
        dice: Any = loss.get_submodule("loss.dc")
        getattr(dice, "_orig_mod", dice).do_bg = True
        return loss

    def get_dataloaders(self) -> tuple[Any, Any]:
        # nnU-Net stores these in the checkpoint.
        axes = range(len(self.configuration_manager.patch_size))
        self.inference_allowed_mirroring_axes = tuple(axes)
        train, validation = self.get_tr_and_val_datasets()
        processes = get_allowed_n_proc_DA()
        return self._load(train, processes, 6), self._load(validation, processes // 2, 3)

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
        # Samples take the place of that transform's channels, which it treats alike.
        downsample = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        targets = downsample(segmentation=class_map)["segmentation"]
        return {"data": image, "target": [target[:, None] for target in targets]}

    def on_train_start(self) -> None:
        super().on_train_start()
        patch_size, folder = self.configuration_manager.patch_size, self.preprocessed_dataset_folder
        smallest, largest = self.fusion.scheme.size_range(patch_size)
        expected = self.dataset_json.get("numTraining")
        for line in (
            *cases.describe_cases(Path(folder), self.fold, expected),
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
        hits, false_positives, misses = score.overlap_counts(confusion)
        return {"loss": loss, "tp_hard": hits, "fp_hard": false_positives, "fn_hard": misses}

    def _validate(self, batch: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
        fused = self._fuse(batch)
        with self._autocast():
            outputs = self.network(fused["data"])
            loss = self.loss(outputs, fused["target"])
        # Of the outputs the first has full resolution.
        confusion = score.confusion_matrix(outputs[0], fused["target"][0][:, 0])
        return loss.cpu().numpy(), confusion

    def _autocast(self) -> torch.autocast:
        """As in nnU-Net's steps: half precision on CUDA only."""
        return torch.autocast(self.device.type, enabled=self.device.type == "cuda")

    def on_epoch_end(self) -> None:
        alphas = self.fusion.class_names()
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        rounded = {alpha: round(float(value), 4) for alpha, value in zip(alphas, dice, strict=True)}
        self.print_to_log_file("Pretext Dice", rounded)
        super().on_epoch_end()
        if self.local_rank == 0:
            # In place of nnU-Net's own, which shows the mean only.
            file = Path(self.output_folder, "progress.png")
            figures.save_pretext_progress(self.logger.get_checkpoint(), alphas, file)
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
        targets = self._example["target"][0][:EXAMPLE_SAMPLES, 0]
        with self._autocast():
            # The bare network: in DDP's forward pass this process would wait for the others.
            predictions = self._bare_network()(images)[0].argmax(1)
        if self.local_rank == 0:
            arrays = tuple(one.cpu().numpy() for one in (images[:, 0], targets, predictions))
            file = Path(self.output_folder, f"volume_fusion_epoch_{self.current_epoch:04d}.png")
            figures.save_fusion_example(arrays, self.fusion.class_names(), file)

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
        found = {
            "trainer": type(self).__name__,
            "epochs": self.current_epoch,
            "cases": len(dataset.identifiers),
            "held_out": self.fold != "all",
            VOLUME_FUSION_ENTRY: self._describe_fusion(),
            **score.pretext_score(counts, self.fusion.class_names()),
        }
        file = Path(self.output_folder, "validation", "pretext_score.json")
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(found, indent=2))
        self.logger.log_summary("final_val/pretext_dice", found["mean_dice"])
        kind = "held-out cases" if found["held_out"] else "the training cases (fold all)"
        self.print_to_log_file(f"Pretext Dice on {kind}: {found['mean_dice']:.4f}, in {file}")
        if unlearned := score.unlearned_classes(found["dice_per_alpha"]):
            self.print_banner(
                f"Volume Fusion has not learned its task: Dice near 0 for alpha {unlearned}.\nIs"
                " the loss in progress.png still falling? Then raise STUNET_EPOCHS and repeat the"
                " command with --c.\nElse look for images without contrast in"
                " volume_fusion_epoch_*.png, or lower STUNET_VF_RATE and start again."
            )

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net does; the final one then says in nnssl's way where its encoder is, and loads
        with ``weights_only=True``, for tools that read such checkpoints."""
        super().save_checkpoint(filename)
        file, network = Path(filename), self._bare_network()
        written = self.local_rank == 0 and not self.disable_checkpointing
        if not written or file.name != FINAL or not hasattr(network, "key_to_encoder"):
            return
        chosen = dict(self.configuration_manager.configuration)
        chosen["architecture"] = self.resolve_architecture(chosen)
        plan = nnssl.make_plan(self.plans_manager.plans, chosen, self.num_input_channels, network)
        whole = nnssl.without_numpy(read_checkpoint(filename, "The final checkpoint"))
        try:
            write_whole(file, partial(torch.save, {**whole, nnssl.ENTRY: plan}))
        except OSError as error:
            self.print_banner(f"{file.name} stays without {nnssl.ENTRY}: {error.strerror}.")

    @classmethod
    def check_input(cls, plans: dict, configuration: str, fold: int | str, dataset: dict) -> None:
        super().check_input(plans, configuration, fold, dataset)
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        if chosen.previous_stage_name is not None:
            raise PluginError(
                f"{configuration} is the second stage of a cascade, which takes segmentations that"
                f" unlabelled scans lack. Pretrain {chosen.previous_stage_name} or 3d_fullres."
            )
        fusion_from(Options()).scheme.size_range(chosen.patch_size)
        folder = Path(nnUNet_preprocessed, manager.dataset_name, chosen.data_identifier)
        train_on_all = f"nnUNetv2_train {manager.dataset_name} {configuration} all"
        cases.check_cases(folder, fold, f"{train_on_all} -tr {cls.__name__}")

    def check_resumable(self, file: str) -> None:
        arguments = read_checkpoint(file, "The checkpoint to resume from,").get("init_args", {})
        now = self._describe_fusion().items()
        was = arguments.get("dataset_json", {}).get(VOLUME_FUSION_ENTRY, dict(now))
        changed = [f"{key} {was.get(key)}, now {new}" for key, new in now if was.get(key) != new]
        if changed:
            raise PluginError(
                f"Cannot resume from {file}: that training had {', '.join(changed)}. Set the"
                " STUNET_VF_ options as they were."
            )
        super().check_resumable(file)


def fusion_from(options: Options) -> fusing.VolumeFusion:
    """Return the fusion that the options ask for; as published where they are not set."""
    published: Any = fusing.SCHEMES[options.whole(names.VF_SCHEME, fusing.DEFAULT_SCHEME)]
    scheme = dataclasses.replace(
        published,
        smallest=options.fraction(names.VF_SMALLEST, published.smallest),
        largest=options.fraction(names.VF_LARGEST, published.largest),
    )
    classes = options.whole(names.VF_CLASSES, fusing.PUBLISHED_CLASSES)
    standardise = bool(options.whole(names.VF_STANDARDISE, 0))
    return fusing.VolumeFusion(classes, scheme, standardise=standardise)


NETWORKS: dict[str, tuple[type[PluginTrainer], str]] = {
    "": (PlannedTrainer, "PlannedTrainer_ft"),
    **{
        f"_STUNet_{size}": (STUNET[f"STUNetTrainer_{size}"], f"STUNetTrainer_{size}_ft")
        for size in PRESETS
    },
    "_PCTNet": (MISFM["PCTNetTrainer"], "PCTNetTrainer_ft"),
    "_FMUNet": (MISFM["FMUNetTrainer"], "FMUNetTrainer_ft"),
}
"""By the suffix of the trainer's name: the trainer of the network, and what fine-tunes it."""


def _make_trainer(suffix: str) -> type[VolumeFusionMixin]:
    network, fine_tuned_by = NETWORKS[suffix]
    attributes = {
        "__doc__": f"Pretrains with Volume Fusion what {fine_tuned_by} fine-tunes.",
        "__module__": __name__,
        "segmentation_trainer": fine_tuned_by,
    }
    return type(f"VolumeFusionTrainer{suffix}", (VolumeFusionMixin, network), attributes)


TRAINERS = {trainer.__name__: trainer for trainer in map(_make_trainer, NETWORKS)}
globals().update(TRAINERS)


def __getattr__(name: str) -> Any:
    # For nnUNet_extTrainer: nnU-Net looks into the modules of this folder, into this one last.
    from stunet_plugin import trainers

    return trainers.__getattr__(name)
