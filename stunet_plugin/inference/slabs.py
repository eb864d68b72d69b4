"""Sliding-window prediction slab by slab: nnU-Net's result without a full-size tensor of classes.

Windows are summed up in a slab as deep as the patch. Planes that no further window touches are
resampled to the image's own grid, and only their labels are kept. Sums are in half precision and in
nnU-Net's order, so that labels are those of ``nnUNetv2_predict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from stunet_plugin.errors import PluginError
from stunet_plugin.networks import cpu_engine

FIRST_AXIS_FROM = 0.6
"""Of the longest axis' length: from here on slabs follow the first axis, in nnU-Net's order."""

Window = tuple[Any, ...]
"""Slices of (channel, *spatial), as nnU-Net makes them; an integer for the plane of a 2D model."""


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


class SlabPredictor(nnUNetPredictor):
    """nnU-Net's predictor, with :meth:`segment` for a case in little memory.

    Attributes:
        outputs: of the network to compute to the end (None: all); the greatest of the others stands
            for them all.
    """

    outputs: tuple[int, ...] | None = None
    network: Any

    def segment(
        self,
        data: Tensor,
        properties: dict[str, Any],
        confidence: bool = False,
        leave_out: Callable[[Sequence[slice]], bool] | None = None,
    ) -> Labels:
        """Return the labels of a preprocessed case on the grid of its image.

        Args:
            data: (channel, *spatial) as nnU-Net's preprocessor makes it, float32.
            properties: of the preprocessor.
            confidence: return it too.
            leave_out: whether a window is background, by its slices of the three axes of ``data``,
                which it may overlap.

        Raises:
            NotFiniteError: the network's output is not finite.
        """
        shape = tuple(properties["shape_after_cropping_and_before_resampling"])
        kind = np.uint8 if len(self.label_manager.foreground_labels) < 255 else np.uint16
        labels = np.zeros(shape, kind)
        sure = np.ones(shape, np.float32) if confidence else None
        resampling = _Resampling.of(self, data.shape[1:], shape, properties)
        counted = Windows()
        if resampling is None:
            planes = self._at_once(data, properties)
        else:
            planes = self._slabs(data, resampling, leave_out, counted)
        for place, logits in planes:
            labels[place], decided = self._decide(logits, confidence)
            if sure is not None:
                sure[place] = decided

        def restored(part: np.ndarray, around: int) -> np.ndarray:
            whole = np.full(properties["shape_before_cropping"], around, part.dtype)
            box = properties["bbox_used_for_cropping"]
            inserted: np.ndarray = insert_crop_into_image(whole, part, box)
            return inserted.transpose(self.plans_manager.transpose_backward)

        # Around what the preprocessor cropped is background, of which the model is sure.
        found = None if sure is None else restored(sure, 1)
        return Labels(restored(labels, 0), found, counted)

    def _at_once(self, data: Tensor, properties: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """All of a case, for resampling functions that are not known here."""
        logits = self.predict_logits_from_preprocessed_data(data).cpu()
        if not torch.isfinite(logits).all():
            raise NotFiniteError("The network's output is not finite.")
        shape = properties["shape_after_cropping_and_before_resampling"]
        resample = self.configuration_manager.resampling_fn_probabilities
        yield ..., torch.as_tensor(resample(logits, shape, *_spacings(self, properties)))

    @torch.inference_mode()
    def _slabs(
        self,
        data: Tensor,
        resampling: _Resampling,
        leave_out: Callable[[Sequence[slice]], bool] | None,
        counted: Windows,
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield an index into the cropped image's grid, and the logits (output, *others) there."""
        patch, axis = self.configuration_manager.patch_size, resampling.axis
        data, kept = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
        kept = kept[1:]
        inside = [kept[other] for other in range(3) if other != axis]
        rows: dict[int, list[Window]] = {}
        for window in self._internal_get_sliding_window_slicers(data.shape[1:]):
            rows.setdefault(_extent(window[1 + axis]).start, []).append(window)
        starts, total = sorted(rows), sum(map(len, rows.values()))
        first = _extent(rows[starts[0]][0][1 + axis])
        slab = self._new_slab(data.shape[1:], axis, first.stop)
        with tqdm(total=total, disable=not self.allow_tqdm, unit="window", leave=False) as bar:
            for start, following in zip(starts, [*starts[1:], data.shape[1 + axis]], strict=True):
                slab.move(start)
                wanted = []
                for window in rows[start]:
                    place = [
                        slice(_extent(part).start - offset.start, _extent(part).stop - offset.start)
                        for part, offset in zip(window[1:], kept, strict=True)
                    ]
                    left_out = leave_out is not None and leave_out(place)
                    counted.total += 1
                    counted.left_out += bool(left_out)
                    wanted += [] if left_out else [window]
                bar.update(len(rows[start]) - len(wanted))
                self._add(slab, wanted, data, axis, bar)
                begin, end = max(start, kept[axis].start), min(following, kept[axis].stop)
                logits = slab.mean(max(end - start, 0), self._background)[:, begin - start :]
                if not torch.isfinite(logits).all():
                    raise NotFiniteError("The network's output is not finite.")
                for plane, values in resampling.planes(logits[:, :, inside[0], inside[1]]):
                    index: list[Any] = [slice(None)] * 3
                    index[axis] = plane
                    yield tuple(index), values

    def _new_slab(self, shape: Sequence[int], axis: int, depth: int) -> _Slab:
        outputs = self.label_manager.num_segmentation_heads
        if self.outputs is not None:
            outputs = len(self.outputs) + (not self.label_manager.has_regions)
        size = (depth, *(length for other, length in enumerate(shape) if other != axis))
        return _Slab(outputs, size, self._results_device)

    @property
    def _results_device(self) -> torch.device:
        return self.device if self.perform_everything_on_device else torch.device("cpu")

    @property
    def _background(self) -> int | None:
        """The output that stands for background; None with regions."""
        if self.label_manager.has_regions:
            return None
        return 0 if self.outputs is None or 0 in self.outputs else len(self.outputs)

    def _add(
        self, slab: _Slab, windows: Sequence[Window], data: Tensor, axis: int, bar: tqdm[Any]
    ) -> None:
        """Add the windows of one position along the axis, of all folds."""
        device, folds = self._results_device, self.list_of_parameters
        weight = torch.ones((), dtype=torch.half, device=device)
        if self.use_gaussian:
            patch = tuple(self.configuration_manager.patch_size)
            weight = compute_gaussian(patch, 1.0 / 8, value_scaling_factor=10, device=device)
        self.network = self.network.to(self.device).eval()
        mixed = torch.autocast(self.device.type, enabled=self.device.type == "cuda")
        for parameters in folds if windows else ():
            if len(folds) > 1 or self._loaded is not parameters:
                self.network.load_state_dict(parameters)
                self._loaded = parameters
            for window in windows:
                x = data[window][None].contiguous().to(self.device)
                with mixed:
                    prediction = self._predict_window(x)[0].to(device)
                slab.add(window, axis, prediction.mul_(weight), weight)
                bar.update(1 / len(folds))

    _loaded: Any = None

    def _predict_window(self, x: Tensor) -> Tensor:
        """Return the outputs wanted of a window (batch, channel, *patch)."""
        network, mirrored = self.network, bool(self.use_mirroring and self.allowed_mirroring_axes)
        self.network = _Chosen(network, self.outputs, self._background is None, not mirrored)
        try:
            prediction: Tensor = self._internal_maybe_mirror_and_predict(x)
        finally:
            self.network = network
        return prediction

    def _decide(self, logits: Tensor, confidence: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the labels of logits (output, *spatial), and their confidence if asked for."""
        manager, sure = self.label_manager, None
        outputs = self.outputs
        if manager.has_regions:
            probabilities = torch.sigmoid(logits.float())
            labels = torch.zeros(logits.shape[1:], dtype=torch.int16, device=logits.device)
            order = manager.regions_class_order
            for probability, output in zip(
                probabilities, outputs or range(len(order)), strict=True
            ):
                labels[probability > 0.5] = order[output]
            if confidence:
                sure = torch.maximum(probabilities, 1 - probabilities).amin(0)
        else:
            top, labels = logits.float().max(0)
            if confidence:
                sure = torch.exp(top - torch.logsumexp(logits.float(), 0))
            if outputs is not None:
                values = torch.tensor([*outputs, 0], device=labels.device)
                labels = values[labels]
        return labels.cpu().numpy(), None if sure is None else sure.cpu().numpy()


class _Chosen(nn.Module):
    """A network of which some outputs are taken, on the CPU through the engine."""

    def __init__(
        self, network: nn.Module, outputs: Sequence[int] | None, regions: bool, shared: bool
    ) -> None:
        super().__init__()
        self.network, self.outputs, self.regions, self.shared = network, outputs, regions, shared

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channel, *spatial) to (batch, output, *spatial); without regions, the greatest of
        the outputs that are not taken comes last."""
        output = cpu_engine.predict(self.network, x, self.shared)
        if output is None:
            output = self.network(x)
        if self.outputs is None:
            return output
        chosen = output[:, list(self.outputs)]
        if self.regions:
            return chosen
        others = [n for n in range(output.shape[1]) if n not in self.outputs]
        return torch.cat([chosen, output[:, others].amax(1, keepdim=True)], 1)


class _Slab:
    """Weighted sums of windows from a position along the axis on: (output, depth, *others)."""

    def __init__(self, outputs: int, size: Sequence[int], device: torch.device) -> None:
        self.start = 0
        self.logits = torch.zeros(outputs, *size, dtype=torch.half, device=device)
        self.weights = torch.zeros(*size, dtype=torch.half, device=device)

    def move(self, start: int) -> None:
        """Move along the axis; the sums that are still inside move with it."""
        step, self.start = start - self.start, start
        for sums in (self.logits.movedim(1, 0), self.weights):
            kept = sums[step:].clone()
            sums[: len(kept)] = kept
            sums[len(kept) :] = 0

    def add(self, window: Window, axis: int, prediction: Tensor, weight: Tensor) -> None:
        """Add the prediction (output, *patch) of a window, weighted already."""
        first, second = [part for other, part in enumerate(window[1:]) if other != axis]
        if isinstance(window[1], int):  # a 2D model, whose slabs are single planes
            prediction, weight = prediction[:, None], weight[None] if weight.ndim else weight
        else:
            prediction = prediction.movedim(1 + axis, 1)
            weight = weight.movedim(axis, 0) if weight.ndim else weight
        self.logits[:, :, first, second] += prediction
        self.weights[:, first, second] += weight

    def mean(self, depth: int, background: int | None) -> Tensor:
        """Return the mean logits of the first planes, which are lost with it; the background wins
        where no window was."""
        logits, weights = self.logits[:, :depth], self.weights[:depth]
        nowhere = weights == 0
        if nowhere.any():
            logits[:, nowhere] = -1
            if background is not None:
                logits[background, nowhere] = 1
            weights.masked_fill_(nowhere, 1)
        return logits.div_(weights)


def _extent(part: Any) -> slice:
    return slice(part, part + 1) if isinstance(part, int) else part


def _spacings(predictor: SlabPredictor, properties: dict[str, Any]) -> tuple[Any, Any]:
    """Return the spacing of the network's input and that of the image, in its order of axes."""
    image = [properties["spacing"][axis] for axis in predictor.plans_manager.transpose_forward]
    own = predictor.configuration_manager.spacing
    return (own if len(own) == len(image) else [image[0], *own]), image


class _Resampling:
    """Resampling of logits to the grid of the (cropped) image, plane by plane along an axis, as
    nnU-Net's functions do it: linear, or nearest along an axis of thick slices.

    Args:
        old, new: shapes before and after.
        nearest: the axis that takes the nearest plane, if there is one.
        rounded: to half precision, as nnU-Net's default does.
        flat: planes follow the first axis, as the windows of a 2D model do.
    """

    def __init__(
        self,
        old: Sequence[int],
        new: Sequence[int],
        nearest: int | None,
        rounded: bool,
        flat: bool = False,
    ) -> None:
        longest = max(old)
        first = flat or old[0] >= FIRST_AXIS_FROM * longest
        self.axis = 0 if first else list(old).index(longest)
        self.old, self.new, self.nearest, self.rounded = old, new, nearest, rounded
        self._kept: list[tuple[int, Tensor]] = []  # planes of the input, resampled within
        self._read = self._written = 0

    @classmethod
    def of(
        cls,
        predictor: SlabPredictor,
        old: Sequence[int],
        new: Sequence[int],
        properties: dict[str, Any],
    ) -> _Resampling | None:
        """Return the resampling of a plan; None if it is of another kind."""
        chosen = predictor.configuration_manager.resampling_fn_probabilities
        settings = dict(chosen.keywords)
        default = chosen.func is resample_data_or_seg_to_shape
        expected: dict[str, Any] = {"is_seg": False}
        if default:
            expected |= {"order": 1, "order_z": 0}
            settings = {"order": 3, **settings}
        elif chosen.func is resample_torch_fornnunet:
            expected |= {"mode": "linear", "aniso_axis_mode": "nearest-exact"}
        else:
            return None
        if any(settings.get(key, value) != value for key, value in expected.items()):
            return None
        names = ("force_separate_z", "separate_z_anisotropy_threshold")
        how = {name: settings[name] for name in names if name in settings}
        how.setdefault("force_separate_z", False if default else None)
        _, axis = determine_do_sep_z_and_axis(
            how.pop("force_separate_z"), *_spacings(predictor, properties), **how
        )
        flat = len(predictor.configuration_manager.patch_size) == 2
        return cls(tuple(old), tuple(new), axis, default, flat)

    def planes(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Take the next planes (output, plane, *others); yield those of the image that are complete
        with them: their index, and (output, *others)."""
        size, new = self.old[self.axis], self.new[self.axis]
        for plane in logits.unbind(1):
            self._kept.append((self._read, self._within(plane)))
            self._read += 1
            while self._written < new:
                place = (self._written + 0.5) * size / new - 0.5
                if self.nearest == self.axis:
                    place = float(np.floor(place + 0.5))
                place = min(max(place, 0.0), size - 1.0)
                low = int(place)
                if min(low + (place > low), size - 1) >= self._read:
                    break
                self._kept = [(number, kept) for number, kept in self._kept if number >= low]
                values = self._kept[0][1]
                if place > low:
                    values = torch.lerp(values, self._kept[1][1], place - low)
                yield self._written, values.half() if self.rounded else values
                self._written += 1

    def _within(self, plane: Tensor) -> Tensor:
        """Resample (output, *others) within the plane."""
        others = [axis for axis in range(3) if axis != self.axis]
        plane = plane.float()
        for number, axis in enumerate(others):
            if axis == self.nearest and self.old[axis] != self.new[axis]:
                places = (torch.arange(self.new[axis]) + 0.5) * self.old[axis] / self.new[axis]
                index = places.long().clamp(max=self.old[axis] - 1).to(plane.device)
                plane = plane.index_select(1 + number, index)
        size = [self.new[axis] for axis in others]
        if list(plane.shape[1:]) == size:
            return plane
        return functional.interpolate(plane[None], size, mode="bilinear")[0]
