"""Bring the features before the segmentation heads of a pretrained STU-Net to the spread that
random weights give them.

The network computes the same otherwise: each decoder stage's last block is scaled (a positive
    factor passes LeakyReLU), and the
convolution that takes its output to the next stage undoes it. What changes is how fast new heads
learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.trainers import stunet_trainers

CASES = 4


def read_patches(files: Sequence[Path], patch_size: Sequence[int]) -> Tensor:
    """Return the corner patches of preprocessed cases, padded with zeros, shape (case, channel,
    *patch)."""
    patches = []
    for file in files:
        image = np.asarray(blosc2.open(str(file))[:], dtype=np.float32)
        inside = tuple(
            slice(min(*sizes)) for sizes in zip(image.shape[1:], patch_size, strict=True)
        )
        patch = np.zeros((len(image), *patch_size), np.float32)
        patch[(slice(None), *inside)] = image[(slice(None), *inside)]
        patches.append(patch)
    return torch.from_numpy(np.stack(patches))


def spreads(network: STUNet, images: Tensor) -> list[float]:
    """Return the standard deviation of each head's input around its channels' means, deepest
    first."""
    found: dict[int, float] = {}

    def keep(head: int, features: Tensor) -> None:
        found[head] = float(features.transpose(0, 1).flatten(1).var(dim=1).sum().sqrt())

    hooks = [
        head.register_forward_pre_hook(lambda _, inputs, number=number: keep(number, inputs[0]))
        for number, head in enumerate(network.decoder.seg_layers)
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return [found[head] for head in sorted(found)]


def scale_features(network: STUNet, factors: Sequence[float]) -> None:
    """Multiply the inputs of the heads, deepest first, and leave what the decoder passes on as it
    was.

    Raises:
        PluginError: stages of more than one block, whose last shortcut cannot be scaled.
    """
    decoder: Any = network.decoder
    with torch.no_grad():
        for step, (stage, factor) in enumerate(zip(decoder.stages, factors, strict=True)):
            block = stage[-1]
            if isinstance(block.shortcut, nn.Identity):
                raise PluginError(
                    "Features can be rescaled where decoder stages have one block: --size tiny,"
                    " small or base."
                )
            for part in (block.norm2, block.shortcut):
                part.weight *= factor
                part.bias *= factor
            if step + 1 < len(decoder.stages):
                decoder.upsample_convs[step + 1].weight /= factor


def write_rescaled(checkpoint: Path, cases: Path, out: Path) -> None:
    """Rescale a pretrained checkpoint by the first preprocessed cases of a folder, unless that is
    done.

    Raises:
        PluginError: the network's features cannot be rescaled.
    """
    if out.is_file():
        return
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    arguments = content["init_args"]
    configuration = PlansManager(arguments["plans"]).get_configuration(arguments["configuration"])
    trainer = getattr(
        stunet_trainers, "STUNetTrainer_" + content["trainer_name"].rpartition("_")[2]
    )
    files = sorted(file for file in cases.glob("*.b2nd") if not file.stem.endswith("_seg"))[:CASES]
    images = read_patches(files, configuration.patch_size)
    outputs = len(content["network_weights"]["decoder.seg_layers.0.bias"])

    torch.manual_seed(1)
    network = trainer.build_network_architecture(
        PlansManager(arguments["plans"]), configuration, images.shape[1], outputs, True
    )
    wanted = spreads(network, images)
    network.load_state_dict(content["network_weights"])
    present = spreads(network, images)
    scale_features(network, [want / have for want, have in zip(wanted, present, strict=True)])
    reached = spreads(network, images)
    if not all(math.isclose(*pair, rel_tol=1e-2) for pair in zip(wanted, reached, strict=True)):
        raise PluginError(f"Rescaled to {reached} instead of {wanted}.")
    print(
        f"features before the heads, deepest first: {np.round(present, 2)} rescaled to"
        f" {np.round(reached, 2)}",
        flush=True,
    )
    content["network_weights"] = network.state_dict()
    # A file half written would be taken for done.
    unfinished = out.with_name(f"{out.name}.unfinished")
    torch.save(content, unfinished)
    unfinished.replace(out)
