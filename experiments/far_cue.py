"""Far cue: objects whose class is told by a marker far away, which a shallow network cannot see.

Makes the numbers of docs/network_options.md, GRC. Images have 32 x 32 pixels, noise, squares in the
right half and a marker in the upper left corner that is bright or dark: of an object's two classes
it tells which. The network has four residual 3x3 layers of 32 channels at full resolution, so it
sees 4 pixels to each side; with GRC the same layers shift half of their channels. Parameters,
images and steps are the same. It shows that the mechanism works, not that it helps on real images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from stunet_plugin.networks.global_receptive_conv import as_grc

SIZE, WIDTH, LAYERS, BATCH, TEST_IMAGES = 32, 32, 4, 8, 200
RATE = 2e-3


class Residual(nn.Module):
    def __init__(self, grid: int) -> None:
        super().__init__()
        conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv = as_grc(conv, (grid, grid), 0.5) if grid > 1 else conv
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.relu(self.norm(self.conv(x)))


def build(grid: int) -> nn.Module:
    """Return the network; ``grid`` 1: without GRC."""
    layers = [Residual(grid) for _ in range(LAYERS)]
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), *layers, nn.Conv2d(WIDTH, 3, 1))


def draw(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (image, 1, row, column) and labels: 0 background, 1 or 2 as the marker says."""
    images = 0.2 * torch.randn(count, 1, SIZE, SIZE, generator=random)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        kind = int(torch.randint(2, (), generator=random))
        image[0, :6, :6] += 1.5 if kind else -1.5
        for _ in range(2):
            row = int(torch.randint(4, SIZE - 10, (), generator=random))
            column = int(torch.randint(SIZE // 2, SIZE - 6, (), generator=random))
            square = slice(row, row + 6), slice(column, column + 6)
            label[square] = 1 + kind
        image[0][label > 0] += 1
    return images, labels


def run(grid: int, seed: int, steps: int) -> dict[str, float]:
    """Train a network; return how often the class is right on the objects of new images, and how
    much of them is found."""
    torch.manual_seed(seed)
    network, random = build(grid), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    started = time.perf_counter()
    for _ in range(steps):
        images, labels = draw(BATCH, random)
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    network.eval()
    images, labels = draw(TEST_IMAGES, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        logits = network(images)
    objects = labels > 0
    which = 1 + logits[:, 1:].argmax(1)
    return {
        "grid": grid,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "class_accuracy": (which == labels)[objects].float().mean().item(),
        "object_found": (logits.argmax(1) > 0)[objects].float().mean().item(),
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grids", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    default = Path(__file__).parent / "results" / "far_cue.json"
    parser.add_argument("--json", type=Path, default=default)
    options = parser.parse_args(arguments)
    runs = []
    for seed in options.seeds:
        for grid in options.grids:
            runs.append(run(grid, seed, options.steps))
            print(json.dumps(runs[-1]), flush=True)
    content = {"torch": torch.__version__, "steps": options.steps, "runs": runs}
    options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
