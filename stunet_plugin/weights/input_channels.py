"""Input convolutions adapted to another number of image channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stunet_plugin.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

REPEAT, MEAN = "repeat", "mean"
STEMS = {
    REPEAT: (
        "the published way: every channel gets the mean kernel over the old channels, undivided"
    ),
    MEAN: (
        "the same divided by (new channels / old channels), so that channels that all show one"
        " image give what that image gave"
    ),
}


def adapt_input_channels(
    tensors: Mapping[str, Tensor], names: Iterable[str], channels: int, stem: str
) -> dict[str, Tensor]:
    """Return the weights with the input convolutions adapted to ``channels`` image channels.

    With M channels in the file and N wanted, each of the N gets m, the mean kernel over the M:

    * ``repeat``: m itself. From one channel this repeats the kernel, as the authors of STU-Net do.
      The response of the convolutions to N copies of an image is N / M times the old one. The
      instance norm behind conv1 takes that factor out again; the shortcut has no norm, so its share
      in the first block grows by it.
    * ``mean``: m * M / N. N copies of an image give exactly the old response, in both convolutions;
      what nnU-Net's loader of nnssl weights does.

    With N = M nothing changes, whatever the choice.

    Raises:
        PluginError: no channels, or an unknown stem.
    """
    if channels < 1:
        raise PluginError(f"--in-channels must be at least 1, not {channels}.")
    if stem not in STEMS:
        raise PluginError(f"--stem must be one of {', '.join(STEMS)}, not {stem!r}.")
    adapted = dict(tensors)
    for name in names:
        weight = adapted[name]
        old = weight.shape[1]
        if old != channels:
            kernel = weight.mean(dim=1, keepdim=True) * (old / channels if stem == MEAN else 1.0)
            adapted[name] = kernel.repeat(1, channels, *([1] * (weight.ndim - 2)))
    return adapted
