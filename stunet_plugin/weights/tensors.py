"""Tensors of untrusted checkpoints: plain, finite, of the names and shapes that a network has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

DIMENSIONS = 3
COUNTER = ".num_batches_tracked"
"""End of the names of the batches that a batch norm has seen; integers, unlike other tensors."""


def plain_tensors(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors without what a file may have attached to them; refuse all but tensors of
    floating-point numbers (counters: of integers) that the file holds in full."""
    import torch

    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    plain = {}
    for name, value in weights.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise PluginError(f"{name!r} is a {type(value).__name__}, not a tensor with a name.")
        tensor = torch.Tensor.detach(value)
        allowed = (torch.int64,) if name.endswith(COUNTER) else floats
        strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not strided or tensor.dtype not in allowed:
            raise PluginError(f"{name} is no plain tensor of floats, but {tensor.dtype}.")
        # Strides of zero repeat one value: a small file would be written as a huge one.
        size = tensor.numel() * tensor.element_size()
        if size == 0 or size > tensor.untyped_storage().nbytes():
            raise PluginError(f"{name} claims {tensor.numel()} values, which the file lacks.")
        plain[name] = tensor
    return plain


def strip_prefix(weights: Mapping[Any, Any], expected: str) -> tuple[dict[Any, Any], str]:
    """Return weights without the prefix that all their names share before the expected name, and
    the prefix, empty if there is none."""
    names = [name for name in weights if isinstance(name, str)]
    for name in names:
        prefix = name.removesuffix(expected)
        if name.endswith(f".{expected}") and all(str(x).startswith(prefix) for x in weights):
            return {x.removeprefix(prefix): weights[x] for x in names}, prefix
    return dict(weights), ""


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], network: str, sizes: str
) -> None:
    """Raise unless names and shapes are the expected ones of a ``network`` of these ``sizes``."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [
        f"{name}: {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name not in missing and tensors[name].shape != shape
    ]
    for found, what in (
        (missing, f"of {len(expected)} tensors are missing"),
        (extra, f"tensors are no part of a {network}"),
        (wrong, f"tensors have the wrong shape for {sizes}"),
    ):
        if found:
            raise PluginError(f"{len(found)} {what} (for example {found[0]}).")


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless every weight is a finite number; takes no memory beside the tensors."""
    ends = ((name, end) for name, x in tensors.items() for end in x.aminmax())
    broken = list(dict.fromkeys(name for name, end in ends if not end.isfinite()))
    if broken:
        raise PluginError(
            f"{path} is refused: {len(broken)} of {len(tensors)} tensors hold NaN or infinite"
            f" values (for example {broken[0]}). The file is damaged or its training diverged: take"
            " another copy or an earlier checkpoint."
        )


def check_convolutions(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise unless these tensors are there, as weights of convolutions in 3D."""
    wrong = [x for x in names if x not in tensors or tensors[x].ndim != DIMENSIONS + 2]
    if wrong:
        raise PluginError(
            f"{len(wrong)} tensors that tell its sizes are missing, or not of a convolution with"
            f" {DIMENSIONS} axes (for example {wrong[0]})."
        )
