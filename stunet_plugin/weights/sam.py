"""Weights of SAM and SAM-Med2D in untrusted checkpoints: which preset they are of, under this
project's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import SAM_PRESETS, SAMPreset
from stunet_plugin.weights.sam_keys import (
    OWN_POSITIONS,
    POSITIONS,
    fit_image_size,
    renamed,
    sam_weights,
)
from stunet_plugin.weights.tensors import check_shapes, plain_tensors, strip_prefix

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTERS = (".Adapter.", ".mlp.adapter.")


@dataclass(frozen=True)
class SAMWeights:
    """Weights of a SAM for small images.

    Attributes:
        title: of what the file is, for people.
        tensors: name to tensor; those of a zip-format file are still mapped to it.
        adapters: whether it is SAM-Med2D, and not SAM without them.
    """

    title: str
    preset: SAMPreset
    tensors: dict[str, Tensor]
    adapters: bool

    @property
    def description(self) -> str:
        """What it is and its sizes, for people."""
        size, preset = self.preset.image_size, self.preset
        parameters = preset.parameters - (0 if self.adapters else preset.adapters)
        return f"{self.title}, {preset.name}, {parameters:,} parameters, {size} x {size} pixels"

    def network(self) -> Any:
        """Return the network with these weights, for prediction."""
        import torch

        from stunet_plugin.networks.sammed2d import SAMMed2D

        with torch.device("meta"):
            network = SAMMed2D(self.preset, self.adapters)
        tensors = {name: x.to(torch.float32) for name, x in self.tensors.items()}
        network.load_state_dict(tensors, assign=True)
        return network.eval()


def read_sam(checkpoint: Mapping[str, Any], path: Path) -> SAMWeights | None:
    """Return the SAM in a checkpoint, None if it holds another network; raise PluginError if it is
    one of unknown sizes, not whole, or of tensors that are none."""
    found = sam_weights(checkpoint)
    if found is None:
        return None
    try:
        return _read(found)
    except PluginError as error:
        raise PluginError(f"{path} is refused as a SAM: {error}") from error


def _read(found: Mapping[Any, Any]) -> SAMWeights:
    import torch

    from stunet_plugin.networks.sammed2d import SAMMed2D

    own = any(str(name).endswith(OWN_POSITIONS) for name in found)
    expected = OWN_POSITIONS if own else POSITIONS
    tensors = plain_tensors(strip_prefix(found, expected)[0])
    if expected not in tensors or tensors[expected].ndim != 4:
        raise PluginError(f"its tensor {expected} is not (1, tokens, tokens, width).")
    _, tokens, columns, width = tensors[expected].shape
    presets = [preset for preset in SAM_PRESETS.values() if preset.width == width]
    if not presets or tokens != columns:
        raise PluginError(
            f"its encoder has width {width} and {tokens} x {columns} tokens. Known is ViT-B (width"
            " 768): sam-med2d_b.pth, ft-sam_b.pth, or SAM's own sam_vit_b_01ec64.pth."
        )
    preset = presets[0]
    adapters = any(part in name for name in tensors for part in _ADAPTERS)
    title = "SAM-Med2D" if adapters else "SAM without adapters"
    if tokens != preset.tokens:
        title += f", positions interpolated from {tokens} x {tokens} tokens"
    if not own:
        tensors = renamed(fit_image_size(tensors, preset))
    with torch.device("meta"):
        network = SAMMed2D(preset, adapters)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_shapes(tensors, shapes, "SAM-Med2D", f"{preset.name} at {preset.image_size} pixels")
    return SAMWeights(title, preset, tensors, adapters)
