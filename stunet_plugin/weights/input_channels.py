"""Input convolutions adapted to another number of image channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stunet_plugin.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

REPEAT, MEAN = "repeat", "mean"


def adapt_input_channels(
    tensors: Mapping[str, Tensor], names: Iterable[str], channels: int, stem: str
) -> dict[str, Tensor]:
    """Return the weights with the input convolutions adapted to ``channels`` image channels.

    With M channels in the file and N wanted, each of the N gets m, the mean kernel over the M:

    * ``repeat``: m itself, as the authors of STU-Net do. N copies of an image give N / M times the
      old response. The instance norm behind conv1 takes that factor out again; the shortcut has no
      norm, so its share in the first block grows by it.
    * ``mean``: m * M / N, as nnU-Net's loader of nnssl weights does. N copies of an image give
      exactly the old response, in both convolutions.

    With N = M nothing changes, whatever the choice.

    Raises:
        PluginError: no channels.
    """
    if channels < 1:
        raise PluginError(f"--in-channels must be at least 1, not {channels}.")
    adapted = dict(tensors)
    for name in names:
        weight = adapted[name]
        old = weight.shape[1]
        if old != channels:
            kernel = weight.mean(dim=1, keepdim=True) * (old / channels if stem == MEAN else 1.0)
            adapted[name] = kernel.repeat(1, channels, *([1] * (weight.ndim - 2)))
    return adapted
