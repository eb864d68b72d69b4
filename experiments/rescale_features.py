"""Features before the heads of a pretrained STU-Net, rescaled to the spread of random weights.

The network computes the same otherwise: each decoder stage's last block is scaled (a positive
factor passes LeakyReLU), and the convolution that takes its output to the next stage undoes it.
What changes is how fast new heads learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.trainers import stunet_trainers

CASES = 4


def read_patches(files: Sequence[Path], patch_size: Sequence[int]) -> Tensor:
    """Return corner patches of preprocessed cases, zero-padded, shape (case, channel, *patch)."""
    corner = [[0, size] for size in patch_size]
    images = (np.asarray(blosc2.open(str(file))[:], dtype=np.float32) for file in files)
    return torch.from_numpy(np.stack([crop_and_pad_nd(image, corner) for image in images]))


def spreads(network: STUNet, images: Tensor) -> list[float]:
    """Return the standard deviation of each head's input around its channels' means, deepest
    first."""
    found: dict[Any, float] = {}

    def keep(head: nn.Module, inputs: tuple[Tensor]) -> None:
        found[head] = float(inputs[0].transpose(0, 1).flatten(1).var(dim=1).sum().sqrt())

    heads = network.decoder.seg_layers
    hooks = [head.register_forward_pre_hook(keep) for head in heads]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return [found[head] for head in heads]


def scale_features(network: STUNet, factors: Sequence[float]) -> None:
    """Multiply the inputs of the heads, deepest first, and leave what the decoder passes on.

    Raises:
        PluginError: stages of more than one block, whose last shortcut cannot be scaled.
    """
    decoder: Any = network.decoder
    with torch.no_grad():
        for step, (stage, factor) in enumerate(zip(decoder.stages, factors, strict=True)):
            block = stage[-1]
            if isinstance(block.shortcut, nn.Identity):
                raise PluginError("Features can be rescaled with --size tiny, small or base.")
            for part in (block.norm2, block.shortcut):
                part.weight *= factor
                part.bias *= factor
            if step + 1 < len(decoder.stages):
                decoder.upsample_convs[step + 1].weight /= factor


def write_rescaled(checkpoint: Path, cases: Path, out: Path) -> None:
    """Rescale a checkpoint by the first preprocessed cases of a folder, unless that is done."""
    if out.is_file():
        return
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    plans = PlansManager(content["init_args"]["plans"])
    configuration = plans.get_configuration(content["init_args"]["configuration"])
    size = content["trainer_name"].rpartition("_")[2]
    trainer = getattr(stunet_trainers, f"STUNetTrainer_{size}")
    files = sorted(file for file in cases.glob("*.b2nd") if not file.stem.endswith("_seg"))[:CASES]
    images = read_patches(files, configuration.patch_size)
    outputs = len(content["network_weights"]["decoder.seg_layers.0.bias"])

    torch.manual_seed(1)
    sizes = images.shape[1], outputs
    network = trainer.build_network_architecture(plans, configuration, *sizes, True)
    wanted = spreads(network, images)
    network.load_state_dict(content["network_weights"])
    present = spreads(network, images)
    scale_features(network, [want / have for want, have in zip(wanted, present, strict=True)])
    reached = spreads(network, images)
    if not all(math.isclose(*pair, rel_tol=1e-2) for pair in zip(wanted, reached, strict=True)):
        raise PluginError(f"Rescaled to {reached} instead of {wanted}.")
    print(f"features before the heads, deepest first: {present} rescaled to {reached}", flush=True)
    content["network_weights"] = network.state_dict()
    # A file half written would be taken for done.
    unfinished = out.with_name(f"{out.name}.unfinished")
    torch.save(content, unfinished)
    unfinished.replace(out)
