"""PromptSession: a promptable model on a scan; prompts in, a mask of one object out."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from torch import Tensor
from torch.nn import functional

from stunet_plugin.errors import PluginError, few
from stunet_plugin.inference.predictor import Model, trained_folds
from stunet_plugin.interactive.frames import VOXEL, Frame
from stunet_plugin.interactive.state import damaged, read_state, write_state
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.prompts import channels as drawing
from stunet_plugin.prompts.channels import ENTRY, Prompt
from stunet_plugin.prompts.interaction import Interaction
from stunet_plugin.prompts.simulation import bounds
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.utils.image_files import MOVE, hash_of_image, place_image, side_files
from stunet_plugin.utils.images import read_geometry, read_label_array

Mask = Path | str | np.ndarray


class PromptSession:
    """A model that was trained by a PromptTrainer, and the object that is being segmented.

    >>> session = PromptSession("MODEL_FOLDER")
    >>> session.set_image(["scan.nii.gz"])
    >>> mask = session.add_point((31, 22, 14))  # x, y, z: (z, y, x) mask of 0 and 1
    >>> mask = session.add_point((25, 22, 14), positive=False)
    >>> session.undo()
    True

    Args:
        model: folder TRAINER__PLANS__CONFIGURATION.
        fold: which, if several are trained.
        device: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        PluginError: no such model, or one that takes no prompts.
    """

    def __init__(
        self,
        model: Path | str,
        fold: str | None = None,
        checkpoint: str = CHECKPOINT,
        device: str = "cpu",
    ) -> None:
        folder = Path(model).expanduser()
        if fold is None and (folder / "plans.json").is_file():
            folds = trained_folds(folder, checkpoint)
            if len(folds) > 1:
                raise PluginError(f"{folder} has folds {', '.join(folds)}. Choose one with -f.")
        self.model = Model(folder, None if fold is None else (fold,), checkpoint, device=device)
        self.radii = _radii_of(self.model)
        self.device = torch.device(device)
        self._network = self.model.predictor.network.to(self.device).eval()
        self.images: tuple[Path, ...] = ()
        self._drawn: list[dict[str, Any]] = []

    def set_image(self, images: Path | str | Sequence[Path | str]) -> None:
        """Take a scan, a file per channel, and forget the one before.

        Raises:
            PluginError: it cannot be used, or has another number of channels.
        """
        given = [images] if isinstance(images, Path | str) else images
        paths = tuple(Path(path).expanduser() for path in given)
        array, self._properties = self.model.read(paths)
        self._frame = Frame(read_geometry(paths[0]), self._properties)
        data, self._noted = self.model.preprocess(array, self._properties)
        self.images, self.shape = paths, tuple(array.shape[1:])
        patch_size = self.model.predictor.configuration_manager.patch_size
        self._interaction = Interaction(self._network, data.float(), patch_size, self.device)
        self._drawn = []

    def add_point(
        self, place: Sequence[float], positive: bool = True, coordinates: str = VOXEL
    ) -> np.ndarray:
        """Add a click at x, y, z: indices of the file, the first 0, or millimetres as ``ras`` or
        ``lps``; where the object is, or not. Return the mask.

        Raises:
            PluginError: outside of the image, or where it is empty.
        """
        voxel = self._current().voxel(place, coordinates, "The point")
        return self._add({"kind": "point", "positive": positive, "start": voxel})

    def add_box(
        self,
        corner: Sequence[float],
        opposite: Sequence[float],
        positive: bool = True,
        coordinates: str = VOXEL,
    ) -> np.ndarray:
        """Add a box from one corner to the opposite one, both inside of it; it may be one voxel
        thin along one axis. Return the mask.

        Raises:
            PluginError: a corner is outside of the image, or the box has no extent.
        """
        frame = self._current()
        corners = [frame.voxel(x, coordinates, "A box's corner") for x in (corner, opposite)]
        start, stop = np.min(corners, 0), np.max(corners, 0) + 1
        if int((stop - start > 1).sum()) < 2:
            raise PluginError(
                f"The box from {frame.describe(corners[0])} to {frame.describe(corners[1])} has no"
                " extent: its corners must differ along two axes at least. For a place, give a"
                " point."
            )
        prompt = {"kind": "box", "start": start.tolist(), "stop": stop.tolist()}
        return self._add({**prompt, "positive": positive})

    def add_scribble(self, mask: Mask, positive: bool = True) -> np.ndarray:
        """Add lines drawn inside the object (or not): a label map on the scan's grid, or an array
        (z, y, x) as :attr:`mask`. Return the mask."""
        return self._add_drawn("scribble", mask, positive)

    def add_lasso(self, mask: Mask, positive: bool = True) -> np.ndarray:
        """Add the filled outline of the object in a slice, given as a scribble is. Return the
        mask."""
        return self._add_drawn("lasso", mask, positive)

    def add_mask(self, mask: Mask, label: int | None = None) -> np.ndarray:
        """Take a segmentation of the object, for example an automatic one, to refine it; ``label``:
        which value of it. Return the mask that the network makes of it.

        Raises:
            PluginError: on another grid, empty, or of several labels without saying which.
        """
        array = self._read_mask(mask, label)
        self._interaction.set_mask(self._to_network(array))
        self._drawn.append({"kind": "mask", "positive": True})
        return self.mask

    def undo(self) -> bool:
        """Take the last prompt back; return whether there was one."""
        self._current()
        if self._drawn:
            self._drawn.pop()
        return self._interaction.undo()

    def reset(self) -> None:
        """Forget all prompts and the mask; the image stays."""
        self._current()
        self._drawn = []
        self._interaction.reset()

    @property
    def mask(self) -> np.ndarray:
        """What was found so far: 1 in the object, 0 elsewhere (z, y, x), as the model's reader has
        the image."""
        self._current()
        found = self._interaction.mask.float() * 2 - 1
        predictor = self.model.predictor
        mask: np.ndarray = convert_predicted_logits_to_segmentation_with_correct_shape(
            torch.stack((-found, found)),
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            self._noted,
            num_threads_torch=torch.get_num_threads(),
        )
        return mask

    @property
    def file_endings(self) -> list[str]:
        """Of the label maps that :meth:`write` can write."""
        return list(self.model.reader.supported_file_endings)

    @property
    def voxel_ml(self) -> float | None:
        """Volume of a voxel of the mask; None in a picture, which has no millimetres."""
        if self._frame.axes == 2:
            return None
        return float(np.prod(self._properties["spacing"])) / 1000

    @property
    def prompts(self) -> list[str]:
        """A line for each prompt so far."""
        lines = []
        for one in self._drawn:
            sign = "" if one["positive"] else "not here, "
            where = f" at {self._frame.describe(one['start'])}" if one["kind"] == "point" else ""
            if one["kind"] == "box":
                last = [x - 1 for x in one["stop"]]
                where = f" from {self._frame.describe(one['start'])} to"
                where += f" {self._frame.describe(last)}"
            lines.append(f"{sign}{one['kind']}{where}")
        return lines

    def write(self, target: Path) -> None:
        """Write the mask as a label map in the scan's geometry, whole or not at all."""
        mask = self.mask
        with tempfile.TemporaryDirectory(prefix=".partial", dir=target.parent) as folder:
            written = Path(folder, target.name)
            with contextlib.redirect_stdout(None):
                self.model.reader.write_seg(mask, str(written), self._properties)
            for old in (*side_files(target), target) if target.exists() else ():
                old.unlink()
            place_image(written, target, MOVE)

    def save_state(self, file: Path) -> None:
        """Write prompts and masks to go on with later, whole or not at all."""
        self._current()
        write_state(file, self._identity(), self._drawn, self._interaction.masks())

    def load_state(self, file: Path) -> None:
        """Go on where a state file ends.

        Raises:
            PluginError: it is none, or of another scan or model.
        """
        self._current()
        drawn, masks = read_state(file, self._identity())
        try:
            prompts = [None if x["kind"] == "mask" else self._prompt(x) for x in drawn]
            self._interaction.restore(prompts, masks)
        except Exception as error:
            raise damaged(file, error) from error
        self._drawn = drawn

    def _identity(self) -> dict[str, Any]:
        scan = [hash_of_image(path) for path in self.images]
        return {"scan": scan, "model": sha256_of(self.model.files[0])}

    def _current(self) -> Frame:
        if not self.images:
            raise PluginError("No image yet: call set_image first.")
        return self._frame

    def _add(self, drawn: dict[str, Any]) -> np.ndarray:
        self._interaction.add(self._prompt(drawn))
        self._drawn.append(drawn)
        return self.mask

    def _add_drawn(self, kind: str, mask: Mask, positive: bool) -> np.ndarray:
        return self._add({"kind": kind, "positive": positive, "mask": self._read_mask(mask, None)})

    def _prompt(self, drawn: Mapping[str, Any]) -> Prompt:
        """Return a prompt in the network's space."""
        kind, positive = drawn["kind"], bool(drawn["positive"])
        if kind == "point":
            low, _ = self._box_in_network(drawn["start"], [x + 1 for x in drawn["start"]], kind)
            return drawing.point(low, positive, self.radii)
        if kind == "box":
            return drawing.box(*self._box_in_network(drawn["start"], drawn["stop"], kind), positive)
        found = self._to_network(drawn["mask"])
        if not bool(found.any()):
            raise PluginError(f"The {kind} lies where the image is empty (zero).")
        start, stop = bounds(found)
        part = tuple(slice(x, y) for x, y in zip(start, stop, strict=True))
        return drawing.drawn(kind, found[part].float(), positive, start)

    def _box_in_network(
        self, start: Sequence[int], stop: Sequence[int], kind: str
    ) -> tuple[list[int], list[int]]:
        """Return a box of the reader's array in the network's space: transposed, cropped to what is
        not zero, resampled."""
        order = self.model.predictor.plans_manager.transpose_forward
        low, high = [], []
        crop, shape = self._noted["bbox_used_for_cropping"], self._interaction.shape
        for place, (first, end), size in zip(order, crop, shape, strict=True):
            scale = size / (end - first)
            x, y = max(start[place], first) - first, min(stop[place], end) - first
            if x >= y:
                raise PluginError(f"The {kind} lies where the image is empty (zero).")
            if kind == "point":
                middle = int((x + 0.5) * scale)
                x, y = middle, middle + 1
            else:
                x, y = int(np.floor(x * scale)), int(np.ceil(y * scale))
            low.append(min(x, size - 1))
            high.append(min(max(y, low[-1] + 1), size))
        return low, high

    def _to_network(self, mask: np.ndarray) -> Tensor:
        """Return a mask in the network's space; thin lines stay in any resolution."""
        order = self.model.predictor.plans_manager.transpose_forward
        box = tuple(slice(*ends) for ends in self._noted["bbox_used_for_cropping"])
        cropped = torch.from_numpy(np.ascontiguousarray(mask.transpose(order)[box] > 0))
        shape = self._interaction.shape
        if tuple(cropped.shape) == shape:
            return cropped
        near = functional.interpolate(cropped[None, None].float(), size=shape, mode="nearest-exact")
        found = near[0, 0] > 0
        if not bool(found.any()):
            steps = torch.tensor(shape) / torch.tensor(cropped.shape)
            found[tuple(((cropped.nonzero() + 0.5) * steps).long().T)] = True
        return found

    def _read_mask(self, mask: Mask, label: int | None) -> np.ndarray:
        """Return a mask (z, y, x) of a file or array, checked for the grid."""
        self._current()
        name = "The array" if isinstance(mask, np.ndarray) else str(mask)
        if isinstance(mask, np.ndarray):
            array = mask
        else:
            grid = read_geometry(mask)
            if not grid.agrees(self._frame.grid):
                raise PluginError(
                    f"{mask} is on another grid than the scan: {grid}, not {self._frame.grid}."
                    " Resample it to the scan, label by label with nearest neighbours."
                )
            array, _, _ = read_label_array(mask, self.model.reader)
        if tuple(array.shape) != self.shape:
            raise PluginError(f"{name} has shape {array.shape} (z, y, x), the scan {self.shape}.")
        values = [int(value) for value in np.unique(array) if value]
        if label is not None:
            found = array == label
            if not found.any():
                there = few(list(map(str, values))) or "none"
                raise PluginError(f"{name} has no voxel of label {label}. There are: {there}.")
            return np.asarray(found)
        if not values:
            raise PluginError(f"{name} is empty: no voxel differs from 0.")
        if len(values) > 1:
            there = few(list(map(str, values)))
            raise PluginError(f"{name} holds the labels {there}. Say which one: --label N.")
        return np.asarray(array > 0)


def _radii_of(model: Model) -> tuple[int, ...]:
    """Return the radii of a click for a model; raise a PluginError if it takes no prompts."""
    entry = model.dataset.get(ENTRY)
    if not isinstance(entry, dict) or "radii" not in entry:
        raise PluginError(
            f"{model.folder} was not trained to follow prompts ({model.trainer}). Train one:"
            " nnUNetv2_train DATASET 3d_fullres FOLD -tr PromptTrainer_STUNet_base, or segment"
            " without prompts: stunet segment."
        )
    radii = entry["radii"]
    if not isinstance(radii, list) or len(radii) != 3 or not all(x in range(65) for x in radii):
        raise PluginError(f"{model.folder}/dataset.json: {ENTRY}.radii must be three integers.")
    return tuple(radii)
