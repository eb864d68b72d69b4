"""Sliding-window prediction slab by slab: nnU-Net's result without a full-size tensor of classes.

Windows are summed up in a slab as deep as the patch. Planes that no further window touches are
resampled to the image's own grid, and only their labels are kept. Sums are in half precision and in
nnU-Net's order, so that labels are those of ``nnUNetv2_predict``; of a network with many outputs,
the inputs of its last layer are summed up, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor
from tqdm import tqdm

from stunet_plugin.errors import PluginError
from stunet_plugin.inference.coarse_box import (
    COARSE_MM,
    Box,
    LeaveOut,
    box_around,
    coarse_copy,
    coarse_leave_out,
    reaches_a_side,
)
from stunet_plugin.inference.decision import decide
from stunet_plugin.inference.output_head import OutputHead
from stunet_plugin.inference.plane_resampling import PlaneResampling
from stunet_plugin.inference.wanted_outputs import WantedOutputs
from stunet_plugin.inference.window_sums import Window, WindowSums


class NotFiniteError(PluginError):
    """The network's output is NaN or infinite."""


@dataclass
class Windows:
    """How many there were, and how many of them were left out."""

    total: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Labels:
    """What comes out of a case: arrays (z, y, x) as the reader writes them.

    The confidence is the probability of the predicted class; with regions, of the decision on the
    region that the model is least sure of.
    """

    labels: np.ndarray
    confidence: np.ndarray | None
    windows: Windows
    uncropped: str = ""
    """Why all of the image was looked at, although it was to be cropped."""


class SlabPredictor(nnUNetPredictor):
    """nnU-Net's predictor, with :meth:`segment` for a case in little memory.

    Attributes:
        outputs: of the network to compute to the end (None: all); the greatest of the others stands
            for them all.
        loaded: those of ``list_of_parameters`` that the network has.
    """

    outputs: tuple[int, ...] | None = None
    loaded: Any = None
    network: Any

    def segment(
        self,
        data: Tensor,
        properties: dict[str, Any],
        confidence: bool = False,
        leave_out: LeaveOut | None = None,
        crop: bool = False,
    ) -> Labels:
        """Return the labels of a preprocessed case on the grid of its image.

        Args:
            data: (channel, *spatial) as nnU-Net's preprocessor makes it, float32.
            properties: of the preprocessor.
            confidence: return it too.
            leave_out: whether a window is background, by its slices of the three axes of ``data``,
                which it may overlap.
            crop: run the network only around what a coarse prediction finds, and everywhere if that
                is nothing, or if there is more.

        Raises:
            NotFiniteError: the network's output is not finite.
        """
        shape = tuple(properties["shape_after_cropping_and_before_resampling"])
        spacings, why = _spacings(self, properties), ""
        settings = (data, shape, spacings, confidence, leave_out)
        box = None
        if crop:
            box, why = self._find_box(data, spacings[0], leave_out)
        labels, sure, counted = self._labels(*settings, box)
        if box and reaches_a_side(labels, box, data.shape[1:]):
            why = "there is more than a coarse look finds"
            labels, sure, counted = self._labels(*settings)

        def restored(part: np.ndarray, around: int) -> np.ndarray:
            whole = np.full(properties["shape_before_cropping"], around, part.dtype)
            box = properties["bbox_used_for_cropping"]
            inserted: np.ndarray = insert_crop_into_image(whole, part, box)
            return inserted.transpose(self.plans_manager.transpose_backward)

        # Around what the preprocessor cropped is background, of which the model is sure.
        found = None if sure is None else restored(sure, 1)
        return Labels(restored(labels, 0), found, counted, why)

    def _find_box(
        self, data: Tensor, spacing: Sequence[float], leave_out: LeaveOut | None
    ) -> tuple[Box | None, str]:
        """Return where a coarse prediction of a preprocessed case finds something; or None, and
        why."""
        coarse = coarse_copy(data, spacing)
        if coarse is None:
            return None, f"the model's own spacing is hardly finer than {COARSE_MM:g} mm"
        old, new = data.shape[1:], tuple(coarse.shape[1:])
        scale = [before / after for before, after in zip(old, new, strict=True)]
        step = [mm * factor for mm, factor in zip(spacing, scale, strict=True)]
        left_out = coarse_leave_out(leave_out, scale)
        labels, _, _ = self._labels(coarse, new, (step, step), False, left_out)
        if not labels.any():
            return None, "a coarse look finds nothing"
        return box_around(labels, old, spacing), ""

    def _labels(
        self,
        data: Tensor,
        shape: Sequence[int],
        spacings: tuple[Any, Any],
        confidence: bool,
        leave_out: LeaveOut | None,
        box: Box | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, Windows]:
        """Return the labels on a grid of ``shape``, their confidence if asked for, and how many
        windows there were; outside of the box is background."""
        counted = Windows()
        kind = np.uint8 if len(self.label_manager.foreground_labels) < 255 else np.uint16
        labels = np.zeros(shape, kind)
        sure = np.ones(shape, np.float32) if confidence else None
        chosen = self.configuration_manager.resampling_fn_probabilities
        flat = len(self.configuration_manager.patch_size) == 2
        resampling = PlaneResampling.of(chosen, data.shape[1:], shape, spacings, flat)
        head = self._output_head(len(data)) if resampling else None
        with head.taken_off() if head else contextlib.nullcontext():
            if resampling is None:
                planes = self._at_once(data, shape, spacings)
            else:
                planes = self._slabs(data, resampling, head, leave_out, box, counted)
            manager = self.label_manager
            order = manager.regions_class_order if manager.has_regions else None
            for place, values in planes:
                labels[place], decided = decide(values, head, self.outputs, order, confidence)
                if sure is not None:
                    sure[place] = decided
        return labels, sure, counted

    @torch.inference_mode()
    def _output_head(self, channels: int) -> OutputHead | None:
        """Return the head of the network, if it pays to take it off."""
        strides = np.prod(self.configuration_manager.pool_op_kernel_sizes, axis=0, dtype=int)
        size = [2 * int(strides[0]), *map(int, strides[1:])]
        self.network = self.network.to(self.device).eval()
        folds, outputs = self.list_of_parameters, self.label_manager.num_segmentation_heads
        regions = self.label_manager.has_regions
        try:
            head = OutputHead.find(self.network, folds, size, channels, regions)
        except Exception:  # a network of another trainer may take no other size than the patch
            return None
        # Features are in float32, outputs in half precision.
        pays = head is not None and 2 * (head.channels * len(folds) + 1) <= outputs
        return head if pays else None

    def _at_once(
        self, data: Tensor, shape: Sequence[int], spacings: tuple[Any, Any]
    ) -> Iterator[tuple[Any, Tensor]]:
        """All of a case, for resampling functions that are not known here."""
        logits = self.predict_logits_from_preprocessed_data(data).cpu()
        if not torch.isfinite(logits).all():
            raise NotFiniteError("The network's output is not finite.")
        resample = self.configuration_manager.resampling_fn_probabilities
        yield ..., torch.as_tensor(resample(logits, shape, *spacings))

    @torch.inference_mode()
    def _slabs(
        self,
        data: Tensor,
        resampling: PlaneResampling,
        head: OutputHead | None,
        leave_out: LeaveOut | None,
        box: Box | None,
        counted: Windows,
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield an index into the cropped image's grid, and the values (channel, *others) there:
        logits, or features for the head."""
        patch, axis = self.configuration_manager.patch_size, resampling.axis
        data, kept = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
        kept = kept[1:]
        inside = [kept[other] for other in range(3) if other != axis]
        rows: dict[int, list[Window]] = {}
        for window in self._windows(data.shape[1:], kept, box):
            rows.setdefault(_extent(window[1 + axis]).start, []).append(window)
        first, last, length = min(rows), max(rows), data.shape[1 + axis]
        side = _extent(rows[first][0][1 + axis])
        depth = side.stop - side.start
        # Where a box leaves planes without windows, too.
        starts = sorted({*rows, *range(0, first, depth), *range(last + depth, length, depth)})
        slab = self._new_slab(data.shape[1:], axis, depth, head)
        resampling.rounded = resampling.rounded and head is None
        total = sum(map(len, rows.values()))
        with tqdm(total=total, disable=not self.allow_tqdm, unit="window", leave=False) as bar:
            for start, following in zip(starts, [*starts[1:], length], strict=True):
                slab.move(start)
                wanted = []
                for window in rows.get(start, ()):
                    place = [
                        _moved(_extent(part), -offset.start)
                        for part, offset in zip(window[1:], kept, strict=True)
                    ]
                    left_out = leave_out is not None and leave_out(place)
                    counted.total += 1
                    counted.left_out += bool(left_out)
                    wanted += [] if left_out else [window]
                bar.update(len(rows.get(start, ())) - len(wanted))
                self._add(slab, wanted, data, axis, head, bar)
                begin, end = max(start, kept[axis].start), min(following, kept[axis].stop)
                values, was_run = slab.mean(max(end - start, 0))
                values, was_run = values[:, begin - start :], was_run[begin - start :]
                if not torch.isfinite(values).all():
                    raise NotFiniteError("The network's output is not finite.")
                part = values[:, :, inside[0], inside[1]]
                for plane, found in resampling.planes(part, was_run, slab.elsewhere):
                    yield (*[slice(None)] * axis, plane), found

    def _windows(
        self, shape: Sequence[int], kept: Sequence[slice], box: Box | None
    ) -> Iterator[Window]:
        """Yield nnU-Net's windows of padded data, or those of a box of the data before that."""
        if box is None:
            yield from self._internal_get_sliding_window_slicers(shape)
            return
        patch = self.configuration_manager.patch_size
        least = [1] * (3 - len(patch)) + list(patch)
        offsets, sizes = [], []
        for side, offset, size, whole in zip(box, kept, least, shape, strict=True):
            # At least a patch, and of the image rather than of the padding.
            length = max(side.stop - side.start, size)
            middle = offset.start + (side.start + side.stop - length) // 2
            offsets.append(min(max(middle, 0), whole - length))
            sizes.append(length)
        for window in self._internal_get_sliding_window_slicers(tuple(sizes)):
            yield (window[0], *map(_moved, window[1:], offsets))

    def _new_slab(
        self, shape: Sequence[int], axis: int, depth: int, head: OutputHead | None
    ) -> WindowSums:
        size = (depth, *(length for other, length in enumerate(shape) if other != axis))
        device = self._results_device
        if head:
            channels = head.channels * len(self.list_of_parameters)
            return WindowSums(torch.zeros(channels + 1, device=device), size, torch.float32)
        regions, outputs = self.label_manager.has_regions, self.outputs
        count = self.label_manager.num_segmentation_heads
        if outputs is not None:
            count = len(outputs) + (not regions)
        elsewhere = torch.full((count,), -1.0, device=device)
        if not regions:
            elsewhere[0 if outputs is None or 0 in outputs else -1] = 1
        return WindowSums(elsewhere, size, torch.half)

    @property
    def _results_device(self) -> torch.device:
        return self.device if self.perform_everything_on_device else torch.device("cpu")

    def _add(
        self,
        slab: WindowSums,
        windows: Sequence[Window],
        data: Tensor,
        axis: int,
        head: OutputHead | None,
        bar: tqdm[Any],
    ) -> None:
        """Add the windows of one position along the axis, of all folds."""
        device, folds = self._results_device, self.list_of_parameters
        weight = torch.ones((), dtype=slab.values.dtype, device=device)
        if self.use_gaussian:
            patch = tuple(self.configuration_manager.patch_size)
            weight = compute_gaussian(patch, 1.0 / 8, value_scaling_factor=10, device=device)
            weight = weight.to(slab.values.dtype)
        mixed = torch.autocast(self.device.type, enabled=self.device.type == "cuda")
        self.network = self.network.to(self.device).eval()
        for number, parameters in enumerate(folds if windows else ()):
            if len(folds) > 1 or self.loaded is not parameters:
                self.network.load_state_dict(head.without(parameters) if head else parameters)
                self.loaded = parameters
            # Features of folds lie behind each other; the weights are added once.
            first = number * head.channels if head else 0
            for window in windows:
                x = data[window][None].contiguous().to(self.device)
                with mixed:
                    prediction = self._predict_window(x, head)[0].to(device)
                share = 0 * weight if first else weight
                slab.add(window, axis, prediction.mul_(weight), share, first)
                bar.update(1 / len(folds))

    def _predict_window(self, x: Tensor, head: OutputHead | None) -> Tensor:
        """Return the outputs wanted of a window (batch, channel, *patch), or its features."""
        network, mirrored = self.network, bool(self.use_mirroring and self.allowed_mirroring_axes)
        outputs = None if head else self.outputs
        self.network = WantedOutputs(
            network, outputs, self.label_manager.has_regions, not mirrored, head
        )
        try:
            prediction: Tensor = self._internal_maybe_mirror_and_predict(x)
        finally:
            self.network = network
        return prediction


def _extent(part: Any) -> slice:
    return slice(part, part + 1) if isinstance(part, int) else part


def _moved(part: Any, by: int) -> Any:
    """Return an index or a slice of an axis, some voxels further on."""
    return part + by if isinstance(part, int) else slice(part.start + by, part.stop + by)


def _spacings(predictor: SlabPredictor, properties: dict[str, Any]) -> tuple[Any, Any]:
    """Return the spacing of the network's input and that of the image, in its order of axes."""
    image = [properties["spacing"][axis] for axis in predictor.plans_manager.transpose_forward]
    own = predictor.configuration_manager.spacing
    return (own if len(own) == len(image) else [image[0], *own]), image
