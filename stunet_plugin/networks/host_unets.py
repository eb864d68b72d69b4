"""Host U-Nets: nnU-Net's own networks, with a place for shape priors before the decoder."""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.architectures import unet
from torch import Tensor, nn


class _RefinesSkips:
    """Comes before a network among the bases."""

    encoder: Any
    decoder: Any
    shape_priors: Any

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.shape_priors: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        skips = self.encoder(x)
        if self.shape_priors is not None:
            skips = self.shape_priors(skips)
        return self.decoder(skips)


class PlainConvUNet(_RefinesSkips, unet.PlainConvUNet):
    """nnU-Net's default network."""


class ResidualEncoderUNet(_RefinesSkips, unet.ResidualEncoderUNet):
    """The network of nnU-Net's ResEnc presets."""


PATHS = {
    f"{unet.__name__}.{network.__name__}": f"{__name__}.{network.__name__}"
    for network in (PlainConvUNet, ResidualEncoderUNet)
}
"""What plans name, and what is built instead to take options."""
