"""What is known of the plan that weights were trained with, and the nnU-Net v2 plans file made of
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import NUM_STAGES
from stunet_plugin.networks.topology import Strides, check_patch_size, published_strides
from stunet_plugin.nnunet.names import CONFIGURATION, NIFTI_ENDINGS, PLANS_NAME, READERS
from stunet_plugin.weights.identify import DIMENSIONS, NetworkWeights

ZSCORE, CT = "ZScoreNormalization", "CTNormalization"
NORMALIZATIONS = (ZSCORE, CT, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")

_ORDERS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
_RESAMPLE = "resample_data_or_seg_to_shape"
RESAMPLING: dict[str, Any] = {
    "resampling_fn_data": _RESAMPLE,
    "resampling_fn_seg": _RESAMPLE,
    "resampling_fn_data_kwargs": _ORDERS,
    "resampling_fn_seg_kwargs": _ORDERS | {"is_seg": True, "order": 1},
    "resampling_fn_probabilities": _RESAMPLE,
    "resampling_fn_probabilities_kwargs": _ORDERS | {"order": 1},
}
"""nnU-Net's defaults, v1 and v2 alike: cubic for images, linear for labels and probabilities,
nearest across thick slices."""

INTENSITIES = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
IDENTITY = tuple(range(DIMENSIONS))


@dataclass(frozen=True)
class SourcePlan:
    """A plan in v2 terms; axes in nnU-Net's transposed order, spacing in mm, sizes in voxels.

    Attributes:
        origin: where it comes from, for people.
        spacing, patch_size, batch_size: of the training.
        poolings: strides of the stages after the first, as the plan has them (not yet fitted to the
            network).
        normalization, mask_for_norm, channel_names: one per channel.
        intensities: per channel, foreground statistics by nnU-Net's names; empty where the plan has
            none.
        transpose_forward, transpose_backward: nnU-Net's.
        median_shape: of the training images after resampling; None where unknown.
        batch_dice: nnU-Net's.
        reader: of :data:`READERS`.
        file_ending: of the images.
        resampling: the six ``resampling_*`` entries.
        published: these are the plan and labels of the published weights.
    """

    origin: str
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    poolings: Strides
    batch_size: int = 2
    normalization: tuple[str, ...] = (ZSCORE,)
    mask_for_norm: tuple[bool, ...] = (False,)
    channel_names: tuple[str, ...] = ("nonCT",)
    intensities: tuple[dict[str, float], ...] = ({},)
    transpose_forward: tuple[int, ...] = IDENTITY
    transpose_backward: tuple[int, ...] = IDENTITY
    median_shape: tuple[float, ...] | None = None
    batch_dice: bool = False
    reader: str = READERS[0]
    file_ending: str = NIFTI_ENDINGS[0]
    resampling: Mapping[str, Any] = field(default_factory=lambda: dict(RESAMPLING))
    published: bool = False

    @property
    def channels(self) -> int:
        return len(self.normalization)

    def strides(self, stages: int) -> Strides:
        """Return the strides of a network with so many stages.

        The published topology cuts or pads the poolings to its six stages; any other depth must be
        the plan's own.

        Raises:
            PluginError: the plan has another depth.
        """
        full: Strides = ((1,) * DIMENSIONS, *self.poolings)
        if stages == NUM_STAGES:
            return published_strides(full)
        if len(full) != stages:
            raise PluginError(
                f"The weights have {stages} stages, so {stages - 1} poolings, but the plan"
                f" ({self.origin}) has {len(self.poolings)}. Give the plan that they were trained"
                " with (--plans), or --strides."
            )
        return full

    def check_network(self, weights: NetworkWeights) -> None:
        """Raise unless the plan is one for these weights: as many channels, and a patch that the
        strides divide."""
        if self.channels != weights.input_channels:
            raise PluginError(
                f"The weights take {weights.input_channels} image channels, but the plan"
                f" ({self.origin}) has {self.channels}. Give the plan that they were trained with:"
                " --plans FILE."
            )
        advice = (
            "Give the plan that the weights were trained with (--plans), or --patch-size and"
            " --strides."
        )
        strides = self.strides(weights.stages)
        check_patch_size(
            self.patch_size,
            strides,
            f"The network with the strides of the plan ({self.origin})",
            advice,
        )

    def with_channels(self, channels: int) -> SourcePlan:
        """Return the plan for a stem inflated to so many channels: the channels' settings over and
        over."""
        if channels == self.channels:
            return self
        order = [channel % self.channels for channel in range(channels)]
        return replace(
            self,
            normalization=tuple(self.normalization[channel] for channel in order),
            mask_for_norm=tuple(self.mask_for_norm[channel] for channel in order),
            channel_names=tuple(self.channel_names[channel] for channel in order),
            intensities=tuple(self.intensities[channel] for channel in order),
        )

    def to_plans(self, weights: NetworkWeights, dataset_name: str) -> dict[str, Any]:
        """Return the content of ``plans.json``.

        Args:
            weights: whose architecture the plan carries.
            dataset_name: ``DatasetXXX_NAME``.
        """
        # nnU-Net asks for these two, but uses them for nothing once a model is trained.
        median_shape = list(self.median_shape or self.patch_size)
        spacing = list(self.spacing)
        return {
            "dataset_name": dataset_name,
            "plans_name": PLANS_NAME,
            "original_median_spacing_after_transp": spacing,
            "original_median_shape_after_transp": [round(size) for size in median_shape],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": list(self.transpose_backward),
            "configurations": {
                CONFIGURATION: {
                    "data_identifier": f"{PLANS_NAME}_{CONFIGURATION}",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": self.batch_size,
                    "patch_size": list(self.patch_size),
                    "median_image_size_in_voxels": median_shape,
                    "spacing": spacing,
                    "normalization_schemes": list(self.normalization),
                    "use_mask_for_norm": list(self.mask_for_norm),
                    **self.resampling,
                    "architecture": weights.architecture(self.strides(weights.stages)),
                    "batch_dice": self.batch_dice,
                }
            },
            # nnU-Net looks this class up by name, so it must be one of its own.
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {
                str(channel): dict(values) for channel, values in enumerate(self.intensities)
            },
        }

    def summary(self) -> str:
        """Return the plan in one line."""
        normalization = (
            self.normalization[0]
            if len(set(self.normalization)) == 1
            else ", ".join(self.normalization)
        )
        return (
            f"spacing {' x '.join(f'{value:g}' for value in self.spacing)} mm, patch"
            f" {' x '.join(map(str, self.patch_size))}, batch {self.batch_size}, poolings"
            f" {[list(stage) for stage in self.poolings]}, {normalization}, {self.reader}"
        )
