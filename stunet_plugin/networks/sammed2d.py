"""SAM-Med2D: a box, points or an earlier mask in, three masks of the object and how good they are.

Paper: J. Cheng et al., arXiv:2308.16184. Published code: github.com/OpenGVLab/SAM-Med2D
(Apache-2.0), read for facts. SAM itself is that of ``transformers``, whose encoder layer computes
x + mlp(norm2(x)); the adapter takes the place of ``mlp`` and adds to it.

Deviation: the adapter's last norm starts at 0 instead of 1, so that a SAM with new adapters
computes what it computed without them. Published weights are not affected.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.presets import SAMPreset

try:
    from transformers import (
        SamConfig,
        SamMaskDecoderConfig,
        SamModel,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
except ModuleNotFoundError as error:
    raise PluginError(
        "SAM-Med2D needs transformers, which is not installed. Run: pip install transformers"
    ) from error

ADAPTER = ".mlp.adapter."
"""Part of the names of the adapters' tensors."""
POSITIVE, NEGATIVE, NO_POINT = 1, 0, -1
"""Labels of points."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of N objects, each in its own image; what is None is not given. Coordinates are
    pixels (x, y) of the network's image, whole numbers in the middle of a pixel.

    Attributes:
        points: (N, points, 2), with ``labels`` (N, points).
        boxes: (N, 4): x and y of the first corner, then of the last.
        masks: (N, 1, mask_size, mask_size), probabilities.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """Images (B, 3, size, size), or their embeddings, and N prompts: N / B in a row per image."""

    images: Tensor | None
    embeddings: Tensor | None
    prompts: Prompts

    def to(self, *device: Any, **options: Any) -> Inputs:
        moved = {one.name: getattr(self, one.name) for one in fields(self)}
        prompts = {one.name: getattr(self.prompts, one.name) for one in fields(Prompts)}
        for given in (moved, prompts):
            for name, value in given.items():
                if isinstance(value, Tensor):
                    given[name] = value.to(*device, **options)
        return Inputs(**{**moved, "prompts": replace(self.prompts, **prompts)})


@dataclass(frozen=True)
class Masks:
    """Three masks per object: logits (N, 3, mask_size, mask_size), their predicted IoU (N, 3), and
    the embeddings of the images that they are in (B, channels, tokens, tokens)."""

    logits: Tensor
    iou: Tensor
    embeddings: Tensor

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the mask of the highest predicted IoU (N, 1, ...), and that IoU (N, 1)."""
        iou, index = self.iou.max(dim=1, keepdim=True)
        return self.logits.take_along_dim(index[:, :, None, None], dim=1), iou


class Adapter(nn.Module):
    """Adapter of SAM-Med2D: a gate per channel, then a convolution down and up again, beside a
    skip. Tokens (B, H, W, C) in and out, H and W even."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // 4
        self.channel = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(width)
        for part in (*self.channel, *self.spatial):
            if hasattr(part, "weight"):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        gated = self.channel(tokens.mean((1, 2), keepdim=True)) * tokens
        spatial = self.spatial(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(tokens + spatial)


class MLPWithAdapter(nn.Module):
    """MLP of an encoder block with the adapter in parallel."""

    def __init__(self, mlp: Any, width: int) -> None:
        super().__init__()
        self.lin1, self.lin2, self.act = mlp.lin1, mlp.lin2, mlp.act
        self.adapter = Adapter(width)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.lin2(self.act(self.lin1(tokens)))
        return mixed + self.adapter(tokens)


class SAMMed2D(SamModel):
    """SAM of a preset with or without adapters; one object per image and call, three masks each."""

    def __init__(self, preset: SAMPreset, adapters: bool = True) -> None:
        super().__init__(_config(preset))
        self.preset = preset
        # As the published code starts. transformers draws weights near 0, which hardly learn.
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                part.reset_parameters()
        # What coordinates are multiplied with: published as a buffer, which no optimizer sees.
        for part in (self.shared_image_embedding, self.prompt_encoder.shared_embedding):
            part.positional_embedding.requires_grad_(False)
        for layer in self.vision_encoder.layers if adapters else ():
            layer.mlp = MLPWithAdapter(layer.mlp, preset.width)

    def forward(self, inputs: Inputs) -> Masks:
        """Return the masks of prompts."""
        embeddings = inputs.embeddings
        if embeddings is None:
            embeddings = self.vision_encoder(inputs.images).last_hidden_state
        logits, iou = self.decode(embeddings, inputs.prompts)
        return Masks(logits, iou, embeddings)

    def decode(
        self, embeddings: Tensor, prompts: Prompts, several: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, 3, mask_size, mask_size) and predicted IoU (N, 3) of N prompts for B
        embedded images; of the one mask for unambiguous prompts, which SAM-Med2D does not use, if
        not ``several``."""
        points, labels, boxes, masks = prompts.points, prompts.labels, prompts.boxes, prompts.masks
        # `transformers` has an axis for objects of one image, which masks lack: one object each.
        sparse, dense = self.prompt_encoder(
            input_points=None if points is None else points[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=masks,
        )
        count = next(len(x) for x in (points, boxes, masks) if x is not None)
        repeated = embeddings.repeat_interleave(count // len(embeddings), 0)
        positions = self.get_image_wide_positional_embeddings().expand(count, -1, -1, -1)
        logits, iou = self.mask_decoder(
            image_embeddings=repeated,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        return logits[:, 0], iou[:, 0]


def _config(preset: SAMPreset) -> Any:
    image = {"image_size": preset.image_size, "patch_size": preset.patch_size}
    vision = SamVisionConfig(
        **image,
        hidden_size=preset.width,
        output_channels=preset.embedding,
        num_hidden_layers=preset.blocks,
        num_attention_heads=preset.heads,
        window_size=preset.window,
        global_attn_indexes=list(preset.global_blocks),
        mlp_dim=preset.width * 4,
        num_pos_feats=preset.embedding // 2,
    )
    prompt = SamPromptEncoderConfig(**image, hidden_size=preset.embedding)
    decoder = SamMaskDecoderConfig(
        hidden_size=preset.embedding,
        mlp_dim=preset.decoder_mlp,
        num_attention_heads=preset.decoder_heads,
        iou_head_hidden_dim=preset.embedding,
    )
    return SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
