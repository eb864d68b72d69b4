"""Plan that weights were trained with, written as a plans file of nnU-Net v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES
from stunet_plugin.networks.topology import Strides, check_patch_size, published_strides
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, PLANS_NAME, READERS
from stunet_plugin.weights.identify import NetworkWeights
from stunet_plugin.weights.tensors import DIMENSIONS

ZSCORE, CT = "ZScoreNormalization", "CTNormalization"
NORMALIZATIONS = (ZSCORE, CT, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")

INTENSITIES = "foreground_intensity_properties_per_channel"

_ORDERS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
RESAMPLE = "resample_data_or_seg_to_shape"
RESAMPLING: dict[str, Any] = {
    "resampling_fn_data": RESAMPLE,
    "resampling_fn_seg": RESAMPLE,
    "resampling_fn_data_kwargs": _ORDERS,
    "resampling_fn_seg_kwargs": _ORDERS | {"is_seg": True, "order": 1},
    "resampling_fn_probabilities": RESAMPLE,
    "resampling_fn_probabilities_kwargs": _ORDERS | {"order": 1},
}
"""nnU-Net's defaults, v1 and v2 alike: cubic for images, linear for labels and probabilities,
nearest across thick slices."""


@dataclass(frozen=True)
class SourcePlan:
    """A plan in v2 terms; axes in nnU-Net's transposed order, spacing in mm, sizes in voxels.

    Attributes:
        origin: where it comes from, for people.
        poolings: strides of the stages after the first, not yet fitted to the network.
        normalization, mask_for_norm, channel_names, intensities: one per channel; intensities are
            foreground statistics by nnU-Net's names, empty where the plan has none.
        median_shape: of the training images after resampling.
        published: these are the plan and labels of the published weights.
    """

    origin: str
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    poolings: Strides
    normalization: tuple[str, ...]
    mask_for_norm: tuple[bool, ...]
    channel_names: tuple[str, ...]
    intensities: tuple[dict[str, float], ...]
    batch_size: int = 2
    transpose_forward: tuple[int, ...] = tuple(range(DIMENSIONS))
    median_shape: tuple[float, ...] | None = None
    batch_dice: bool = False
    reader: str = READERS[0]
    file_ending: str = NIFTI_ENDINGS[0]
    resampling: Mapping[str, Any] = field(default_factory=lambda: dict(RESAMPLING))
    published: bool = False

    @property
    def channels(self) -> int:
        return len(self.normalization)

    def strides(self, weights: NetworkWeights) -> Strides:
        """Return the strides of a network: the published six stages of STU-Net cut or pad the
        poolings; any other number must be the plan's own."""
        full: Strides = ((1,) * DIMENSIONS, *self.poolings)
        stages = len(weights.features)
        if stages == NUM_STAGES and weights.kind == "STUNet":
            return published_strides(full)
        if len(full) != stages:
            raise PluginError(
                f"The weights have {stages} stages, so {stages - 1} poolings, but the plan"
                f" ({self.origin}) has {len(self.poolings)}. Give --plans or --strides."
            )
        return full

    def check_network(self, weights: NetworkWeights) -> None:
        """Raise unless the channels are those of the weights, and the strides divide the patch."""
        if self.channels != weights.input_channels:
            raise PluginError(
                f"The weights take {weights.input_channels} image channels, but the plan"
                f" ({self.origin}) has {self.channels}. Give that of the training: --plans FILE."
            )
        check_patch_size(
            self.patch_size,
            self.strides(weights),
            f"The network with the strides of the plan ({self.origin})",
            "Give the plan of the training (--plans), or --patch-size and --strides.",
        )

    def with_channels(self, channels: int) -> SourcePlan:
        """Return the plan for so many channels: the channels' settings over and over."""
        names = ("normalization", "mask_for_norm", "channel_names", "intensities")
        order = [channel % self.channels for channel in range(channels)]
        changes: dict[str, Any] = {x: tuple(getattr(self, x)[i] for i in order) for x in names}
        return replace(self, **changes)

    def to_plans(self, weights: NetworkWeights, dataset_name: str) -> dict[str, Any]:
        """Return the content of ``plans.json``; the architecture is that of the weights."""
        median_shape = list(self.median_shape or self.patch_size)
        return {
            "dataset_name": dataset_name,
            "plans_name": PLANS_NAME,
            # nnU-Net asks for these two, but uses them for nothing once a model is trained.
            "original_median_spacing_after_transp": list(self.spacing),
            "original_median_shape_after_transp": [round(size) for size in median_shape],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": list(map(self.transpose_forward.index, range(DIMENSIONS))),
            "configurations": {
                CONFIGURATION: {
                    "data_identifier": f"{PLANS_NAME}_{CONFIGURATION}",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": self.batch_size,
                    "patch_size": list(self.patch_size),
                    "median_image_size_in_voxels": median_shape,
                    "spacing": list(self.spacing),
                    "normalization_schemes": list(self.normalization),
                    "use_mask_for_norm": list(self.mask_for_norm),
                    **self.resampling,
                    "architecture": weights.architecture(self.strides(weights)),
                    "batch_dice": self.batch_dice,
                }
            },
            # nnU-Net looks this class up by name, so it must be one of its own.
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            INTENSITIES: {
                str(channel): dict(values) for channel, values in enumerate(self.intensities)
            },
        }

    def summary(self) -> str:
        """Return the plan in one line."""
        schemes = self.normalization[: None if len(set(self.normalization)) > 1 else 1]
        return (
            f"spacing {' x '.join(f'{value:g}' for value in self.spacing)} mm, patch"
            f" {' x '.join(map(str, self.patch_size))}, batch {self.batch_size}, poolings"
            f" {list(map(list, self.poolings))}, {', '.join(schemes)}, {self.reader}"
        )
