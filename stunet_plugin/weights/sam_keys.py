"""Names and shapes of SAM's tensors: the published ones become those of ``networks.sammed2d``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stunet_plugin.networks.presets import SAMPreset
from stunet_plugin.weights.safe_loading import plain_dict

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = "image_encoder.pos_embed"
"""Name that every published SAM has, (1, tokens, tokens, width)."""
OWN_POSITIONS = "vision_encoder.pos_embed"
"""What this project calls the same."""
_FOURIER = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_RENAMED = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.blocks\.(\d+)\.norm([12])\.", r".layers.\1.layer_norm\2."),
    (r"\.blocks\.(\d+)\.Adapter\.", r".layers.\1.mlp.adapter."),
    (r"\.blocks\.", ".layers."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"point_embeddings\.", "point_embed."),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"transformer\.layers\.(\d+)\.norm(\d)\.", r"transformer.layers.\1.layer_norm\2."),
    (r"norm_final_attn\.", "layer_norm_final_attn."),
    (r"(mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
)
"""Patterns in published names, and what they become, in this order."""


def sam_weights(checkpoint: Mapping[str, Any]) -> dict[Any, Any] | None:
    """Return what a checkpoint calls the weights of a SAM, with any prefix that all names share:
    of SAM-Med2D (``model``), of SAM (the file itself), or of this project; None if it has none."""
    for held in (checkpoint.get("model"), checkpoint.get("network_weights"), checkpoint):
        if isinstance(held, dict):
            weights = plain_dict(held)
            if any(str(name).endswith((POSITIONS, OWN_POSITIONS)) for name in weights):
                return weights
    return None


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published weights under this project's names."""
    ours = {}
    for name, value in weights.items():
        new = name
        for pattern, replacement in _RENAMED:
            new = re.sub(pattern, replacement, new)
        ours[new] = value
        if name == _FOURIER:
            # The same numbers embed the positions in the image.
            ours["shared_image_embedding.positional_embedding"] = value
    return ours


def fit_image_size(weights: Mapping[str, Tensor], preset: SAMPreset) -> dict[str, Tensor]:
    """Return weights of a SAM for larger images with the positions of a preset's tokens: bilinear
    between the old ones, as published."""
    import torch
    from torch.nn import functional

    fitted = dict(weights)
    size = (preset.tokens, preset.tokens)
    if fitted[POSITIONS].shape[1:3] != size:
        grid = fitted[POSITIONS].permute(0, 3, 1, 2).to(torch.float32)
        grid = functional.interpolate(grid, size, mode="bilinear", align_corners=False)
        fitted[POSITIONS] = grid.permute(0, 2, 3, 1)
    offsets = 2 * preset.tokens - 1
    for block in preset.global_blocks:
        for axis in "hw":
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            if name in fitted and fitted[name].ndim == 2 and len(fitted[name]) != offsets:
                table = fitted[name].T[None].to(torch.float32)
                table = functional.interpolate(table, offsets, mode="linear", align_corners=False)
                fitted[name] = table[0].T
    return fitted
