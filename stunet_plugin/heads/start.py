"""Start of the segmentation heads: rows of the pretrained model by name, the others fitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stunet_plugin.errors import few
from stunet_plugin.heads.by_name import Outputs, Row
from stunet_plugin.heads.patches import Patch
from stunet_plugin.heads.regression import Fit, Linear, Samples, fit
from stunet_plugin.networks.features import (
    head_modules,
    last_convolution,
    read_features,
    sample_voxels,
)

MOST_VOXELS = 10_000
"""Of a level in a regression."""


@dataclass
class Heads:
    """The heads of a network, to be changed.

    Attributes:
        network: the bare one, with deep supervision.
        tensors: those of the heads by their names in the network, whole, on the CPU.
        rows: outputs that are taken over by name.
        lines: what was done, for the log.
    """

    network: nn.Module
    tensors: dict[str, Tensor]
    rows: dict[int, Row] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def convolutions(self) -> list[tuple[str, nn.Module]]:
        """Name and module of the convolution that makes the logits of each head, the coarsest
        first."""
        names = {module: name for name, module in self.network.named_modules()}
        found = map(last_convolution, head_modules(self.network))
        return [(names[module], module) for module in found]

    def take(self, weights: Mapping[str, Tensor], rows: Mapping[int, Row]) -> None:
        """Take rows over from a model's weights, and with them what comes before the convolutions:
        norms and activations, which know no classes."""
        self.rows = dict(rows)
        parts = {f"{name}.{part}" for name, _ in self.convolutions for part in ("weight", "bias")}
        for name, own in self.tensors.items():
            if name not in parts:
                self.tensors[name] = weights[name].to(own.dtype).clone()
                continue
            for output, row in rows.items():
                own[output] = row.take(weights[name].to(own.dtype))
        self._set()

    def _set(self) -> None:
        # After a forward pass a sharded network (FSDP2) still holds some parameters whole.
        if reshard := getattr(self.network, "reshard", None):
            reshard()
        self.network.load_state_dict(self.tensors, strict=False)

    def fit(
        self,
        outputs: Outputs,
        patches: Callable[[], Iterable[Patch]],
        patch_size: Sequence[int],
        seed: int,
    ) -> None:
        """Fit what is not taken over from the very same class to features of the patches, head by
        head. Norms of heads that start anew get the statistics of their inputs there."""
        started = time.monotonic()
        modules = [module for _, module in self.convolutions]
        training = self.network.training
        self.network.eval()
        try:
            if not self.rows:
                self._measure_norms(patches(), patch_size)
            labels = sorted({0, *(value for values in outputs.values for value in values)})
            samples = SampledFeatures(outputs, labels)
            for patch in patches():
                voxels = sample_voxels(patch.labels, labels, patch.name, seed)
                if voxels:
                    given = patch.image, voxels, patch_size, 1.0, modules
                    samples.add(patch, read_features(self.network, *given))
        finally:
            self.network.train(training)
        if not samples.finite:
            self.lines.append("Segmentation heads at random: features are not finite numbers.")
            return
        absent = [x for x, there in enumerate(samples.there()) if not there]
        if lost := [outputs.names[x] for x in absent if x not in self.rows]:
            self.lines.append(
                f"Segmentation heads at random: {few(lost, 20)} (no voxel in the sampled patches)"
            )
        fixed = {x for x, row in self.rows.items() if row.exact} | set(absent)
        free = torch.tensor([x not in fixed for x in range(len(outputs.names))])
        if not free.any():
            return
        blank = torch.tensor([x not in self.rows for x in range(len(outputs.names))])
        scores: list[Fit] = []
        for level, (name, _) in enumerate(self.convolutions):
            weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
            middle: Any = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
            # A larger kernel is taken for what it is where features do not change from voxel to
            # voxel, and starts with the voxel itself.
            start = Linear(weight.flatten(2).sum(2).float(), bias.float())
            fitted = fit(samples.of_level(level, seed), start, free, blank)
            whole = torch.zeros_like(weight)
            whole[middle] = fitted.head.weight
            weight[free], bias[free] = whole[free], fitted.head.bias[free]
            scores.append(fitted)
        fitted_names = few([name for name, one in zip(outputs.names, free, strict=True) if one], 20)
        finest, seconds = scores[-1], time.monotonic() - started
        self.lines.append(
            f"Segmentation heads by fit: {fitted_names} ({samples.patches} patches of"
            f" {len(samples.cases)} cases, {seconds:.1f} s; at full resolution {finest.method}, a"
            f" Dice of {float(finest.dice.nanmean()):.3f} on sampled voxels of held-out cases)"
        )
        self._set()

    def _measure_norms(self, patches: Iterable[Patch], patch_size: Sequence[int]) -> None:
        """Set the running statistics of batch norms in the heads to those of the patches."""
        modules = dict(self.network.named_modules())
        heads = {id(part) for head in head_modules(self.network) for part in head.modules()}
        norms = {
            name: module
            for name, module in modules.items()
            if isinstance(module, _BatchNorm) and id(module) in heads
        }
        if not norms:
            return
        momentum = {name: norm.momentum for name, norm in norms.items()}
        device = next(self.network.parameters()).device
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all patches
            norm.train()
        try:
            with torch.no_grad():
                for patch in patches:
                    padded = pad_nd_image(patch.image, patch_size, "constant", {"value": 0})
                    self.network(padded[None].to(device))
        finally:
            for name, norm in norms.items():
                norm.momentum = momentum[name]
                norm.eval()
                for part, value in norm.named_buffers():
                    self.tensors[f"{name}.{part}"] = value.detach().cpu().clone()


class SampledFeatures:
    """Features of the sampled voxels of all patches, level by level."""

    def __init__(self, outputs: Outputs, labels: Sequence[int]) -> None:
        self.outputs, self.labels = outputs, labels
        self.patches, self.cases, self.finite = 0, set[int](), True
        self._levels: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def add(self, patch: Patch, features: Sequence[Mapping[int, np.ndarray]]) -> None:
        """Add a patch: per level, label to features (voxel, channel)."""
        self.patches += 1
        self.cases.add(patch.case)
        self._levels = self._levels or [[] for _ in features]
        for level, of_level in zip(self._levels, features, strict=True):
            for label, values in of_level.items():
                self.finite &= bool(np.isfinite(values).all())
                share = (patch.labels == label).sum() / len(values)
                facts = np.tile([label, share, patch.case], (len(values), 1))
                level.append((values, facts))

    def there(self) -> list[bool]:
        """Return for each output whether any voxel shows it."""
        found = {int(label) for _, facts in self._levels[-1] for label in facts[:1, 0]}
        return [bool(found.intersection(values)) for values in self.outputs.values]

    def of_level(self, level: int, seed: int) -> Samples:
        """Return the samples of a level, the coarsest is 0."""
        features, facts = map(np.concatenate, zip(*self._levels[level], strict=True))
        kept = np.random.default_rng(seed).permutation(len(features))[:MOST_VOXELS]
        features, facts = features[kept], facts[kept]
        targets = [np.isin(facts[:, 0], values) for values in self.outputs.values]
        return Samples(
            torch.from_numpy(features),
            torch.from_numpy(np.stack(targets, 1).astype(np.float32)),
            torch.from_numpy(facts[:, 1].astype(np.float32)),
            torch.from_numpy(facts[:, 2].astype(np.int64)),
            self.outputs.regions,
        )
