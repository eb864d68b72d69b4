"""SAMSession: SAM-Med2D on a picture or, slice by slice, on a scan; used as a PromptSession is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stunet_plugin.errors import PluginError
from stunet_plugin.interactive.frames import Frame
from stunet_plugin.interactive.session import Mask, PromptSession
from stunet_plugin.interactive.state import damaged, read_state, write_state
from stunet_plugin.sam.images import CHANNELS, slices_to_bytes, to_bytes
from stunet_plugin.sam.slice_interaction import SliceInteraction
from stunet_plugin.utils.image_files import PICTURES, ImageError, ending_of
from stunet_plugin.utils.images import read_geometry, read_images
from stunet_plugin.utils.validation import Fields
from stunet_plugin.weights.sam import SAMWeights

CLIPPED = "CTNormalization"


class _Model:
    """File of the weights, and nnU-Net's reader of the image."""

    def __init__(self, file: Path) -> None:
        from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        self.files = (file,)
        self._readers = {True: NaturalImage2DIO(), False: SimpleITKIO()}
        self.reader: Any = self._readers[False]

    @property
    def file_endings(self) -> list[str]:
        """Of images and label maps that can be read and written."""
        return [x for one in self._readers.values() for x in one.supported_file_endings]

    def choose_reader(self, image: Path) -> None:
        self.reader = self._readers[ending_of(image) in PICTURES]


class SAMSession(PromptSession):
    """SAM-Med2D and the object that is being segmented; see PromptSession.

    A volume is cut across the axis of its largest voxel spacing. A box or a mask is taken in each
    slice that it touches, a point in its own; nothing is carried to other slices.

    Args:
        found: of :func:`find_sam.find_sam`.
    """

    def __init__(self, found: tuple[Path, dict[str, Any], SAMWeights], device: str = "cpu") -> None:
        file, checkpoint, weights = found
        self.model: Any = _Model(file)
        self.device = torch.device(device)
        self._network = weights.network().to(self.device)
        arguments = checkpoint.get("init_args")
        plans = arguments.get("plans") if isinstance(arguments, dict) else None
        self._plans = Fields(plans, "the plan in the checkpoint") if plans else None
        self.images: tuple[Path, ...] = ()
        self._drawn: list[dict[str, Any]] = []

    def set_image(self, images: Path | str | Sequence[Path | str]) -> None:
        """Take a picture or a scan, grey or in colours, and forget the one before.

        Raises:
            PluginError: it cannot be used, or has other channels.
        """
        given = [images] if isinstance(images, Path | str) else images
        if len(given) != 1:
            raise PluginError(f"SAM-Med2D takes one file, grey or in colours, not {len(given)}.")
        path = Path(given[0]).expanduser()
        grid = read_geometry(path)
        self.model.choose_reader(path)
        array, self._properties = _read(path, self.model.reader)
        self._frame = Frame(grid, self._properties)
        self.images, self.shape = (path,), tuple(array.shape[1:])
        steps = [float(step) for step in self._properties["spacing"]]
        self._axis = 0 if self._frame.axes == 2 else steps.index(max(steps))
        self._interaction: Any = SliceInteraction(
            self._network, self._as_bytes(array, path), self.device
        )
        self._drawn = []

    def _as_bytes(self, array: np.ndarray, path: Path) -> Tensor:
        """Return slices (slices, channels, height, width) from 0 to 255: pictures as they are,
        volumes by their range; for weights that were trained here as there, slice by slice."""
        values = torch.from_numpy(np.ascontiguousarray(array)).float()
        slices = values.movedim(1 + self._axis, 0)
        if self._plans is not None:
            return slices_to_bytes(_clipped(slices, self._plans))
        if ending_of(path) in PICTURES and values.max() <= 255:
            return slices
        return to_bytes(slices, values.min(), values.max())

    @property
    def file_endings(self) -> list[str]:
        return self.model.reader.supported_file_endings if self.images else self.model.file_endings

    def add_scribble(self, mask: Mask, positive: bool = True) -> np.ndarray:
        raise PluginError("SAM-Med2D knows points, boxes and masks, no scribbles. Give points.")

    def add_lasso(self, mask: Mask, positive: bool = True) -> np.ndarray:
        raise PluginError(
            "SAM-Med2D knows points, boxes and masks, no lassos. Give its outline as --mask."
        )

    def _add(self, drawn: dict[str, Any]) -> np.ndarray:
        self._draw(drawn)
        self._drawn.append(drawn)
        return self.mask

    def _draw(self, drawn: Mapping[str, Any]) -> None:
        kind = drawn["kind"]
        if kind == "mask":
            self._interaction.set_mask(self._to_network(drawn["mask"]))
        elif kind == "point":
            index, row, column = self._in_slices(drawn["start"])
            self._interaction.point(index, row, column, bool(drawn["positive"]))
        elif not drawn["positive"]:
            raise PluginError("SAM-Med2D has no boxes for where the object is not. Give points.")
        else:
            self._interaction.box(self._in_slices(drawn["start"]), self._in_slices(drawn["stop"]))

    def add_mask(self, mask: Mask, label: int | None = None) -> np.ndarray:
        array = self._read_mask(mask, label)
        return self._add({"kind": "mask", "positive": True, "mask": array})

    def _in_slices(self, voxel: Sequence[int]) -> tuple[int, int, int]:
        """Return (slice, row, column) of a voxel (z, y, x)."""
        place = [int(x) for x in voxel]
        index = place.pop(self._axis)
        return index, place[0], place[1]

    def _to_network(self, mask: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(mask > 0)).movedim(self._axis, 0)

    @property
    def mask(self) -> np.ndarray:
        """What was found so far: 1 in the object, 0 elsewhere (z, y, x)."""
        self._current()
        found: Tensor = self._interaction.mask.movedim(0, self._axis)
        return found.numpy().astype(np.uint8)

    def write(self, target: Path) -> None:
        known = self.file_endings
        if not target.name.endswith(tuple(known)):
            raise PluginError(f"-o {target}: for this image it must end in {', '.join(known)}.")
        super().write(target)

    def save_state(self, file: Path) -> None:
        """Write the prompts to go on with later, whole or not at all; masks come of them again."""
        self._current()
        none = [np.zeros(0, np.uint8)] * (len(self._drawn) + 1)
        write_state(file, self._identity(), self._drawn, none)

    def load_state(self, file: Path) -> None:
        self._current()
        drawn, _ = read_state(file, self._identity())
        try:
            for one in drawn:
                self._draw(one)
        except Exception as error:
            raise damaged(file, error) from error
        self._drawn = drawn


def _read(path: Path, reader: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an image (channel, z, y, x) and its geometry."""
    grey, colours = CHANNELS
    try:
        return read_images([path], reader, grey)
    except ImageError:
        return read_images([path], reader, colours)


def _clipped(slices: Tensor, plans: Fields) -> Tensor:
    """Return a CT clipped as the plan says; other images as they are, whose range a plan's
    normalisation does not change."""
    chosen = plans.fields("configurations").fields("2d")
    schemes = chosen.get("normalization_schemes", [])
    if not schemes or schemes[0] != CLIPPED:
        return slices
    limits = plans.fields("foreground_intensity_properties_per_channel").fields("0")
    low, high = (float(limits.get(f"percentile_{x}")) for x in ("00_5", "99_5"))
    return slices.clamp(low, high)
