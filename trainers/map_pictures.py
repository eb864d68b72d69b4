"""Pictures of what a network's option does, while it trains: maps of shape priors, and which tokens
are kept."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks.shape_priors import ShapePriors
from stunet_plugin.networks.vision_transformer import TokenAssembly
from stunet_plugin.trainers.base_trainer import PluginTrainer
from stunet_plugin.utils.figures import saved_figure

SAMPLES, MOST_CLASSES = 2, 5


class MapPictures(PluginTrainer):
    """Writes ``maps_epoch_*.png`` of the same validation samples, with each checkpoint; comes
    before the network's trainer among the bases."""

    _samples: Tensor | None = None

    def on_train_start(self) -> None:
        super().on_train_start()
        self._samples = next(self.dataloader_val)["data"][:SAMPLES].to(self.device)
        self._save_maps()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        if self.current_epoch % self.save_every == 0 or self.current_epoch == self.num_epochs:
            self._save_maps()

    @torch.no_grad()
    def _save_maps(self) -> None:
        # All processes take part in a forward pass of a sharded network.
        if self._samples is None or (self.local_rank != 0 and not self.sharded):
            return
        network = self._bare_network()
        self.network.eval()
        maps = read_maps(network, self._samples)
        if self.local_rank == 0:
            file = Path(self.output_folder, f"maps_epoch_{self.current_epoch:04d}.png")
            save_maps(self._samples, maps, file)


def read_maps(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return maps (image, *spatial) of the images' size, by their titles."""
    found: dict[str, Tensor] = {}
    shape, mode = images.shape[2:], "bilinear" if images.ndim == 4 else "trilinear"

    def note_prior(priors: ShapePriors, output: Tensor) -> None:
        cells = output.unflatten(-1, priors.blocks[-1].grid).float()
        maps = functional.interpolate(cells, shape, mode=mode)
        for number in range(min(maps.shape[1], MOST_CLASSES)):
            found[f"prior of output {number}"] = maps[:, number]

    def note_tokens(places: list[Tensor], grid: tuple[int, ...]) -> None:
        survived = torch.cat([torch.full_like(x, cut) for cut, x in enumerate(places)], 1)
        order = torch.cat(places, 1).argsort(-1)[:, 1:]  # without the class token
        cells = survived.gather(1, order).unflatten(-1, grid)[:, None].float()
        encoder: Any = network.encoder
        token = encoder.patch_embedding.stride
        maps = functional.interpolate(
            cells, [size * step for size, step in zip(grid, token, strict=True)]
        )
        for axis, size in enumerate(shape, 2):
            maps = maps.narrow(axis, 0, size)
        found["cuts that a token survived"] = maps[:, 0]

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, ShapePriors) and module.start is not None:
                update: Any = module.blocks[-1].get_submodule("update")
                handle = update.register_forward_hook(
                    lambda _, __, output, priors=module: note_prior(priors, output)
                )
                hooks.callback(handle.remove)
            if isinstance(module, TokenAssembly):
                handle = module.register_forward_pre_hook(
                    lambda _, given: note_tokens(given[1], tuple(given[2]))
                )
                hooks.callback(handle.remove)
        network(images)
    return found


def save_maps(images: Tensor, maps: dict[str, Tensor], path: Path) -> None:
    """Write a PNG, a row per image: its first channel and its maps; of three axes the middle slice
    of axis 0."""
    columns = {"image": images[:, 0], **maps}
    rows = len(images)
    with saved_figure(path, 2.6 * len(columns), 2.8 * rows) as figure:
        axes = figure.subplots(rows, len(columns), squeeze=False)
        for column, (title, values) in enumerate(columns.items()):
            for row, value in enumerate(values.float().cpu()):
                shown = value[len(value) // 2] if value.ndim == 3 else value
                colours = "viridis" if column else "gray"
                axes[row, column].imshow(shown.numpy(), cmap=colours, interpolation="nearest")
                axes[row, column].set_axis_off()
                axes[row, column].set_title(title, fontsize=9)
