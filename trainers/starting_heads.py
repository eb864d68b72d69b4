"""Trainer whose segmentation heads start from what is known: by name from the pretrained model, by
fit from the training cases (``STUNET_HEADS``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import distributed

from stunet_plugin.errors import PluginError
from stunet_plugin.heads.by_name import (
    Outputs,
    Row,
    describe_rows,
    have_heads,
    match,
    source_outputs,
)
from stunet_plugin.heads.patches import training_patches
from stunet_plugin.heads.start import Heads
from stunet_plugin.options import HEADS, SEED, Options
from stunet_plugin.trainers import sharding
from stunet_plugin.trainers.distributed_trainer import DistributedTrainer

AUTO, RANDOM, NAME, FIT = HEADS.words
IN_HEADS = ".seg_layers."


class StartingHeads(DistributedTrainer):
    """Sets the heads before epoch 0, in every process alike; a resumed training keeps its own."""

    fine_tuning: ClassVar[bool] = False
    segments_labels: ClassVar[bool] = True
    _resumes = False

    @classmethod
    def heads_wanted(cls) -> str:
        """Return how heads start, a word of STUNET_HEADS."""
        chosen = Options().word(HEADS) or (AUTO if cls.fine_tuning else RANDOM)
        return chosen if cls.segments_labels else RANDOM

    @classmethod
    def check_heads(cls, dataset: dict, checkpoint: Mapping[str, Any], file: str) -> None:
        """Raise a PluginError if a class stands twice in the dataset or the pretrained model."""
        if cls.heads_wanted() != RANDOM:
            _matched(dataset, checkpoint, file, cls.heads_wanted())

    def start_heads(self, checkpoint: Mapping[str, Any] | None, file: str | None) -> None:
        """Set the heads, and log which classes start from what. Every process has to call this.

        Args:
            checkpoint: of the pretrained model, read from ``file``; None without one.
        """
        wanted = self.heads_wanted()
        if self._resumes or wanted == RANDOM or (checkpoint is None and wanted != FIT):
            return
        network = self._bare_network()
        own = {name: x for name, x in network.state_dict().items() if IN_HEADS in name}
        whole = sharding.gather(own, keep=True) if self.sharded else own
        heads = Heads(network, {name: x.detach().cpu().clone() for name, x in whole.items()})
        try:
            _ = heads.convolutions
        except PluginError as error:
            if wanted != AUTO:
                raise
            self.print_to_log_file(f"Segmentation heads at random: {error}")
            return
        target, source, rows = _matched(self.dataset_json, checkpoint or {}, file or "", wanted)
        weights = (checkpoint or {}).get("network_weights", {})
        if source is not None and rows and have_heads(weights, heads.tensors, len(source.names)):
            heads.take(weights, rows)
            names = describe_rows(rows, source, target)
            self.print_to_log_file(f"Segmentation heads by name: {names} (from {file})")
        exact = [row for row in heads.rows.values() if row.exact]
        if wanted != NAME and len(exact) < len(target.names):
            self._fit_heads(heads, target)
        if self._several_processes:
            # All have computed the same, but for rounding.
            for name, tensor in heads.tensors.items():
                heads.tensors[name] = tensor.to(self.device)
                distributed.broadcast(heads.tensors[name], src=0)
            network.load_state_dict(heads.tensors, strict=False)

    def _fit_heads(self, heads: Heads, target: Outputs) -> None:
        if self.is_cascaded:
            self.print_to_log_file(
                "Segmentation heads at random: those of a cascade's second stage are not fitted."
            )
            return
        seed, patch_size = Options().whole(SEED, 0), self.configuration_manager.patch_size
        dataset, _ = self.get_tr_and_val_datasets()
        labels = sorted({0, *(value for values in target.values for value in values)})
        decoder: Any = heads.network.decoder
        before, decoder.deep_supervision = decoder.deep_supervision, True
        try:
            heads.fit(
                target,
                lambda: training_patches(dataset, patch_size, labels, seed),
                patch_size,
                seed,
            )
        finally:
            decoder.deep_supervision = before
        for line in heads.lines:
            self.print_to_log_file(line)


def _matched(
    dataset: Mapping[str, Any], checkpoint: Mapping[str, Any], file: str, wanted: str
) -> tuple[Outputs, Outputs | None, dict[int, Row]]:
    """Return what the outputs of the new and of the pretrained network mean, and what the new one
    takes over by name."""
    try:
        target = Outputs.of(dataset, "of the new dataset")
        source = None if wanted == FIT else source_outputs(checkpoint, file)
    except PluginError as error:
        raise PluginError(
            f"{error} Or do without names: {HEADS.variable}=random (or fit, if it is the pretrained"
            " model's)."
        ) from error
    return target, source, {} if source is None else match(source, target)
