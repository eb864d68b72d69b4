"""Base trainer of this project: checks before anything is written, deep supervision that pairs up,
training options, fine-tuning, pretrained weights."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from stunet_plugin import options as names
from stunet_plugin.errors import PluginError
from stunet_plugin.networks import topology
from stunet_plugin.networks.activation_checkpointing import BLOCK, STAGE
from stunet_plugin.networks.from_plan import NO_OPTIONS, REPLAN, Resolved, options_of, resolve
from stunet_plugin.networks.presets import MISFMPreset, STUNetPreset, UNETRPreset
from stunet_plugin.options import Options
from stunet_plugin.trainers.distributed_trainer import check_distribution
from stunet_plugin.trainers.fine_tuning import (
    FineTuningScheduler,
    encoder_parameters,
    parameter_groups,
)
from stunet_plugin.trainers.safe_trainer import discard_gradients, read_to_resume
from stunet_plugin.trainers.starting_heads import StartingHeads
from stunet_plugin.weights import pretrained
from stunet_plugin.weights.trained_options import trained_options

UNTRAINED_HEAD_WEIGHT = 1e-6
"""Loss weight of outputs that nnU-Net gives none: without a gradient for their heads DDP stops."""


class PluginTrainer(StartingHeads):
    """Base of the trainers of this project: a subclass says which network it builds
    (:meth:`resolve_architecture`) and its published schedule; iterations are per epoch."""

    learning_rate: ClassVar[float] = 1e-2
    epochs: ClassVar[int] = 1000
    iterations: ClassVar[int] = 250
    val_iterations: ClassVar[int] = 50
    preset: ClassVar[STUNetPreset | MISFMPreset | UNETRPreset | None]
    network_options: ClassVar[Mapping[str, Any]] = NO_OPTIONS
    """Added to the plan's network, see ``networks.network_options``; the plan's own come first."""

    can_checkpoint: ClassVar[bool] = False  # activations

    inference_allowed_mirroring_axes: tuple[int, ...] | None
    _choices: tuple[str, ...] = ()  # lines for the log on what was chosen by the plan
    _weights_were_loaded = False
    _name_hooks: tuple[Any, ...] = ()

    # nnU-Net reads the names of these parameters off the signature.
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        self._options = options = Options()
        dataset_json = self.dataset_to_record(dataset_json)
        self.check_input(plans, configuration, fold, dataset_json)
        recorded = self.plans_to_record(plans, configuration)
        super().__init__(recorded, configuration, fold, dataset_json, device)
        self.initial_lr = self.learning_rate
        self.num_epochs = options.whole(names.EPOCHS, self.epochs)
        self.num_iterations_per_epoch = options.whole(names.ITERATIONS, self.iterations)
        self.num_val_iterations_per_epoch = options.whole(names.VAL_ITERATIONS, self.val_iterations)
        seed = options.whole(names.SEED, -1)
        if seed >= 0:
            # Processes augment differently; they start from the weights of the first.
            torch.manual_seed(seed + self.local_rank)
        for line in (*options.lines(), *self._choices):
            self.print_to_log_file(line)

    @classmethod
    def resolve(cls, configuration: dict[str, Any]) -> Resolved:
        """Return the network for a configuration of a plan; raise a PluginError if the plan is not
        for this trainer."""
        if not hasattr(cls, "preset"):
            raise PluginError(
                f"{cls.__name__} is a base class; choose a trainer with `stunet list`."
            )
        return resolve(configuration, cls.preset, cls.__name__, cls.network_options)

    @classmethod
    def resolve_architecture(cls, configuration: dict[str, Any]) -> dict[str, Any]:
        """Return the same as an ``architecture`` entry of plans."""
        return cls.resolve(configuration).architecture

    @classmethod
    def read_pretrained(
        cls, file: str, network: torch.nn.Module, channels: int
    ) -> pretrained.Pretrained:
        """Read the file after ``-pretrained_weights`` for a network; ``channels``: of the image."""
        return pretrained.read_for(file, network)

    def plans_to_record(self, plans: dict, configuration: str) -> dict:
        """Return the plans that the checkpoint and the file beside it hold, for prediction: with
        the network in them where something was chosen, so that nobody has to choose again."""
        chosen = PlansManager(plans).get_configuration(configuration).configuration
        architecture, reason, options = self.resolve(chosen)
        self._choices = (*((reason,) if reason else ()), *options)
        if not self._choices:
            return plans
        recorded = copy.deepcopy(plans)
        recorded["configurations"][configuration]["architecture"] = architecture
        return recorded

    def dataset_to_record(self, dataset_json: dict) -> dict:
        """Return the description of the dataset that is stored like the plans."""
        return dataset_json

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer for parameter groups: nnU-Net's SGD."""
        return torch.optim.SGD(
            groups, self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
        )

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        *sizes: Any,
        **options: Any,
    ) -> torch.nn.Module:
        """Build the network; nnU-Net calls this for training and for inference."""
        chosen = configuration_manager.configuration
        chosen = {**chosen, "architecture": cls.resolve_architecture(chosen)}
        build = nnUNetTrainer.build_network_architecture
        return build(plans_manager, ConfigurationManager(chosen), *sizes, **options)

    def _planned_options(self) -> Mapping[str, Any]:
        return options_of(self.configuration_manager.configuration)

    def _network_strides(self) -> topology.Strides:
        architecture = self.resolve_architecture(self.configuration_manager.configuration)
        return topology.as_strides(architecture["arch_kwargs"]["strides"])

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """One scale per output of the network, whose strides may differ from the plan's."""
        strides = self._network_strides()
        return topology.deep_supervision_scales(strides) if self.enable_deep_supervision else None

    def _build_loss(self) -> torch.nn.Module:
        """nnU-Net halves the weight from output to output and gives the deepest none. As published,
        that follows the poolings where the network has more decoder stages than those."""
        loss = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper):
            weights = np.array(loss.weight_factors)
            poolings = sum(max(stage) > 1 for stage in self._network_strides())
            weights[max(poolings - 1, 1) :] = 0
            weights /= weights.sum()
            loss.weight_factors = tuple(float(w) or UNTRAINED_HEAD_WEIGHT for w in weights)
        return loss

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        *rest, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self._options.whole(names.MIRRORING, 1):
            # The second is stored in the checkpoint, where prediction reads it.
            axes = self.inference_allowed_mirroring_axes = None
        return (*rest, axes)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        encoder_rate = self._options.fraction(names.ENCODER_RATE, 1.0)
        optimizer = self.make_optimizer(parameter_groups(self._bare_network(), encoder_rate))
        optimizer.register_step_pre_hook(self._discard_gradients_unless_finite)
        optimizer.register_step_pre_hook(self._keep_frozen_encoder)
        warmup = self._options.whole(names.WARMUP_EPOCHS, 0)
        schedule = FineTuningScheduler(optimizer, self.initial_lr, self.num_epochs, warmup)
        return optimizer, schedule

    def _keep_frozen_encoder(self, *_: Any) -> None:
        if self.current_epoch < self._options.whole(names.FROZEN_ENCODER_EPOCHS, 0):
            discard_gradients(encoder_parameters(self._bare_network()))

    def initialize(self) -> None:
        super().initialize()
        self._bare_network().register_load_state_dict_post_hook(self._note_loaded_weights)
        self._accept_other_names()

    def _accept_other_names(self) -> None:
        """Let nnU-Net's loader take a file with other names, or without a decoder."""
        if file := _pretrained_file():
            network = self._bare_network()
            given = self.read_pretrained(file, network, self.num_input_channels)
            if given.renamed:
                self.print_to_log_file(f"{given.renamed}: {file}")
                self._name_hooks = pretrained.show_as_own(network, given)

    def _note_loaded_weights(self, *_: Any) -> None:
        self._weights_were_loaded = True

    def on_train_start(self) -> None:
        for hook in self._name_hooks:
            hook.remove()
        super().on_train_start()
        network = self._bare_network()
        strides = " ".join(str(list(stage)) for stage in self._network_strides())
        count = sum(parameter.numel() for parameter in network.parameters())
        # nnU-Net has just printed the plan, which may name another network.
        self.print_to_log_file(
            f"Network: {type(network).__name__}, {count:,} parameters, strides {strides}"
        )
        file, checkpoint = _pretrained_file(), None
        if self._weights_were_loaded and file:
            weights = self.whole_weights()
            given = self.read_pretrained(file, network, self.num_input_channels)
            checkpoint = given.checkpoint
            if self.local_rank == 0:
                loaded = pretrained.describe_loaded(weights, checkpoint)
                self.print_to_log_file(f"{loaded} ({file})")
                had, has = trained_options(checkpoint), list(self._planned_options())
                if had != has:
                    of_file, here = (", ".join(names) or "none" for names in (had, has))
                    self.print_to_log_file(f"Network options: {here}; of those weights: {of_file}")
        if self.fine_tuning and not self._weights_were_loaded:
            self.print_banner(
                f"{type(self).__name__} is for fine-tuning, but no pretrained weights were given.\n"
                "Stop and add -pretrained_weights /path/to/checkpoint_final.pth, or use the trainer"
                " without _ft."
            )
        self.start_heads(checkpoint, file)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, str):
            self.check_resumable(filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        self._resumes = True

    @classmethod
    def check_input(cls, plans: dict, configuration: str, fold: int | str, dataset: dict) -> None:
        """Refuse wrong input before nnU-Net's own constructor makes folders and log files."""
        required = ("dataset_name", "plans_name", "configurations")
        lacking = [key for key in required if not plans.get(key)]
        if lacking:
            raise PluginError(f"The plans file lacks {', '.join(lacking)}. {REPLAN}")
        if configuration not in plans["configurations"]:
            raise PluginError(
                f"The plans {plans['plans_name']} have no configuration {configuration!r}."
                f" Available: {', '.join(plans['configurations'])}."
            )
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        cls.resolve_architecture(chosen.configuration)
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            if not os.environ.get(variable):
                raise PluginError(f"{variable} is not set: export {variable}=/path/to/{variable}")
        plan = f"{manager.plans_name}, {configuration}"
        for key in ("data_identifier", "batch_size"):
            if not chosen.configuration.get(key):
                raise PluginError(f"The plan {plan} has no {key}. {REPLAN}")
        data = Path(nnUNet_preprocessed, manager.dataset_name, chosen.data_identifier)
        if not data.is_dir() or not any(data.iterdir()):
            dataset_id = int(manager.dataset_name.removeprefix("Dataset")[:3])
            raise PluginError(
                f"{manager.dataset_name} is not preprocessed for {plan}: no data in {data}. Run:"
                f" nnUNetv2_preprocess -d {dataset_id} -plans_name {manager.plans_name} -c"
                f" {configuration}"
            )
        _check_writable(Path(nnUNet_results))
        channels = determine_num_input_channels(manager, chosen, dataset)
        try:
            with torch.device("meta"):
                network = cls.build_network_architecture(manager, chosen, channels, 1)
        except Exception as error:
            raise PluginError(
                f"{cls.__name__} cannot build the network of {plan}: {error} {REPLAN}"
            ) from error
        check_distribution(chosen, network)
        options = Options()
        setting = options.word(names.CHECKPOINTING)
        if setting in (STAGE, BLOCK) and not cls.can_checkpoint:
            raise PluginError(
                f"{names.CHECKPOINTING.variable}={setting} is for the trainers of STU-Net;"
                f" {cls.__name__} has no activation checkpointing. Unset it, or plan for less"
                " memory (-gpu_memory_target)."
            )
        if (
            options.whole(names.FROZEN_ENCODER_EPOCHS, 0)
            or options.fraction(names.ENCODER_RATE, 1) < 1
        ):
            encoder_parameters(network)
        if file := _pretrained_file():
            # nnU-Net's loader would stop at an assertion.
            if not Path(file).is_file():
                raise PluginError(f"-pretrained_weights {file}: there is no such file.")
            checkpoint = cls.read_pretrained(file, network, channels).checkpoint
            weights = checkpoint["network_weights"]
            mismatches = pretrained.describe_mismatches(network, weights, heads_too=False)
            if mismatches:
                raise PluginError(
                    f"-pretrained_weights {file} does not fit {cls.__name__}: it was written by"
                    f" {checkpoint.get('trainer_name', 'an unknown trainer')} and {mismatches}."
                )
            cls.check_heads(dataset, checkpoint, file)

    def check_resumable(self, file: str) -> None:
        """Say why a training cannot resume from a checkpoint, before nnU-Net changes anything."""
        checkpoint = read_to_resume(file)
        name, weights = type(self).__name__, checkpoint["network_weights"]
        mismatches = pretrained.describe_mismatches(self._bare_network(), weights, heads_too=True)
        if mismatches:
            raise PluginError(
                f"Cannot resume {name} from {file}: it is of {checkpoint.get('trainer_name')} and"
                f" {mismatches}. Resume with its trainer and plans, or start again without --c."
            )
        state = checkpoint.get("optimizer_state")
        if state is None:
            raise PluginError(
                f"Cannot resume from {file}: it holds weights only. Start a training from them: -tr"
                f" {name.removesuffix('_ft')}_ft -pretrained_weights {file}"
            )
        groups = len(state["param_groups"])
        if groups != len(self.optimizer.param_groups):
            had = f"{'without' if groups == 1 else 'with'} {names.ENCODER_RATE.variable}"
            raise PluginError(
                f"Cannot resume from {file}: that training started {had}. Use the same options."
            )


def _pretrained_file() -> str | None:
    return pretrained.pretrained_weights_on_command_line(sys.argv)


def _check_writable(folder: Path) -> None:
    """Raise unless files can be made in a folder, or in the nearest existing one above it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PluginError(
            f"Cannot write results to {folder} ({os.strerror(error.errno or 0)}). Set"
            " nnUNet_results to a folder that you may write to."
        ) from error
