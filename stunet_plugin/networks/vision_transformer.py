"""Vision transformer of UNETR, with token pruning (STP) and their assembly (MTA) on request.

Paper: Zhou et al., Token Sparsification for Faster Medical Image Segmentation, arXiv:2303.06522.
Published code: github.com/cvlab-stonybrook/TokenSparse-for-MedSeg (Apache-2.0), read for facts, not
copied. The same function as published in both modes; deviations:

* Tokens are sorted and gathered, in shapes that are known beforehand; published: boolean masks.
* At least one token is kept. Attention is fused; scores and their noise are in float32.
* 2D too; an input of another size than the network was built for interpolates the position table.
* Score networks start by fan-in (Xavier): as published their gradients vanish in narrow networks.

Axes: tokens (batch, token, width), the class token first while it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MLP_RATIO, EPS, STD = 4, 1e-6, 0.02


@dataclass(frozen=True)
class Pruning:
    """After which blocks (counted from 1) tokens leave, and the share of the tokens left that does;
    ``random``: no scores, the control. ``assembly`` blocks put all tokens together again, with the
    transformer's width and heads (0) or their own."""

    after: tuple[int, ...] = (3, 6, 9)
    ratio: float = 0.75
    random: bool = False
    assembly: int = 1
    assembly_width: int = 0
    assembly_heads: int = 0

    def kept(self, tokens: int) -> list[int]:
        """Return the tokens before the first cut and after each."""
        counts = [tokens]
        for _ in self.after:
            # Truncated as published: 9 of 100 tokens at 0.9.
            counts.append(max(int(counts[-1] * (1 - self.ratio)), 1))
        return counts


class TransformerBlock(nn.Module):
    """LayerNorm - attention, LayerNorm - MLP, each added to its input."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = (
            nn.Linear(*sizes) for sizes in ((width, MLP_RATIO * width), (MLP_RATIO * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = _attention(q, k, v)
        x = x + self._drop(self.proj(mixed.transpose(1, 2).flatten(-2)))
        return x + self._drop(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: a sample skips the branch."""
        if not self.training or not self.drop_path:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "meta":
        return functional.scaled_dot_product_attention(q, k, v)
    # Where memory is estimated: what that falls back to there keeps matrices that no device keeps.
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return output


class ScoreNetwork(nn.Module):
    """How important each token is, from the token and the mean of all; at most 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, width)
        sizes = (width, width // 2, width // 4, 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        own, shared = functional.gelu(self.token(self.norm(tokens))).chunk(2, dim=-1)
        x = torch.cat((own, shared.mean(1, keepdim=True).expand_as(shared)), dim=-1)
        first, second, last = self.layers
        x = last(functional.gelu(second(functional.gelu(first(x)))))
        exact = torch.promote_types(x.dtype, torch.float32)
        return functional.logsigmoid(x.squeeze(-1).to(exact))


class Split(NamedTuple):
    """Tokens that leave and that stay, their places among all, and the factors of those that stay,
    which are 1 and carry the gradients of the scores."""

    left: Tensor
    left_places: Tensor
    kept: Tensor
    kept_places: Tensor
    factors: Tensor


def gumbel_noise(like: Tensor) -> Tensor:
    """Return Gumbel(0, 1) noise of the shape of scores."""
    return -torch.empty_like(like).exponential_().clamp_min(torch.finfo(like.dtype).tiny).log()


class TokenPruning(nn.Module):
    """One cut: the tokens with the highest scores stay, in training with Gumbel noise added."""

    def __init__(self, width: int, random: bool) -> None:
        super().__init__()
        self.scores = None if random else ScoreNetwork(width)

    def forward(self, tokens: Tensor, places: Tensor, factors: Tensor, keep: int) -> Split:
        """Split tokens without the class token; ``places`` (batch, token) are theirs among all."""
        if self.scores is None:
            scores = torch.rand(tokens.shape[:2], device=tokens.device)
        else:
            scores = self.scores(tokens)
        weights = None
        if self.training and self.scores is not None:
            weights = (scores + self.noise(scores)).softmax(-1)
        order = (scores if weights is None else weights).argsort(-1, descending=True)
        # Sorted: the original order is kept.
        kept, left = order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values
        parts: dict[str, Tensor] = {}
        for name, chosen in (("kept", kept), ("left", left)):
            part = _take(tokens, chosen)
            if weights is not None:
                # Straight through: 1, with the gradient of the weight, or of 1 - the weight.
                drawn = weights.gather(1, chosen)
                change = drawn - drawn.detach()
                value = factors.gather(1, chosen) * (1 + change if name == "kept" else 1 - change)
                part = part * value.unsqueeze(-1).to(part.dtype)
                parts[f"{name}_factors"] = value
            else:
                parts[f"{name}_factors"] = factors.gather(1, chosen)
            parts[name], parts[f"{name}_places"] = part, places.gather(1, chosen)
        return Split(
            parts["left"],
            parts["left_places"],
            parts["kept"],
            parts["kept_places"],
            parts["kept_factors"],
        )

    def noise(self, scores: Tensor) -> Tensor:
        return gumbel_noise(scores)


def _take(tokens: Tensor, chosen: Tensor) -> Tensor:
    return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class TokenAssembly(nn.Module):
    """The tokens of all cuts, each with a linear layer and a token of its cut, in their old places
    through transformer blocks (MTA)."""

    def __init__(self, width: int, parts: int, blocks: int, inner: int, heads: int) -> None:
        super().__init__()
        self.inner = inner
        self.enter = nn.ModuleList(nn.Linear(width, inner) for _ in range(parts))
        self.cut_tokens = nn.ParameterList(torch.zeros(1, 1, inner) for _ in range(parts))
        self.blocks = nn.Sequential(*(TransformerBlock(inner, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(inner, eps=EPS)
        self.out = nn.Linear(inner, width)

    def forward(self, parts: list[Tensor], places: list[Tensor], grid: Sequence[int]) -> Tensor:
        """The last of the parts begins with the class token, at place 0; returns (batch, token,
        width) without it."""
        entered = [
            layer(part) + token
            for layer, part, token in zip(self.enter, parts, self.cut_tokens, strict=True)
        ]
        x = _take(torch.cat(entered, 1), torch.cat(places, 1).argsort(-1))
        x = x + sine_table(grid, self.inner, x.device).to(x.dtype)
        return self.out(self.norm(self.blocks(x)))[:, 1:]


def sine_table(grid: Sequence[int], width: int, device: Any = None) -> Tensor:
    """Return fixed positions (1, 1 + token, width): sines and cosines of each axis' index, as
    published in 3D; zeros for the class token."""
    count = width // (2 * len(grid))
    steps = torch.arange(count, dtype=torch.float64, device=device) / count
    speeds = 10000.0**-steps
    axes = [torch.arange(size, dtype=torch.float64, device=device) for size in grid]
    columns = []
    for axis in torch.meshgrid(*axes, indexing="ij"):
        angles = axis.flatten()[:, None] * speeds
        columns += [angles.sin(), angles.cos()]
    table = torch.cat(columns, 1).float()
    return torch.cat((table.new_zeros(1, table.shape[1]), table))[None]


class VisionTransformer(nn.Module):
    """An image whose sizes the token's divide to a map of tokens (batch, width, *grid)."""

    def __init__(
        self,
        input_channels: int,
        token: Sequence[int],
        grid: Sequence[int],
        width: int,
        depth: int,
        heads: int,
        drop_path: float,
        pruning: Pruning | None,
    ) -> None:
        super().__init__()
        self.grid, self.pruning = tuple(grid), pruning
        conv: Any = nn.Conv2d if len(token) == 2 else nn.Conv3d
        self.patch_embedding = conv(input_channels, width, tuple(token), tuple(token))
        self.class_token = nn.Parameter(EPS * torch.randn(1, 1, width))
        self.positions = nn.Parameter(_truncated(torch.empty(1, 1 + prod(grid), width)))
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=EPS)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                _truncated(layer.weight)
                nn.init.zeros_(layer.bias)
        self.cuts = self.left_norms = self.assembly = None
        if pruning is not None:
            count = len(pruning.after)
            self.cuts = nn.ModuleList(TokenPruning(width, pruning.random) for _ in range(count))
            self.left_norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in range(count))
            inner = pruning.assembly_width or width, pruning.assembly_heads or heads
            self.assembly = TokenAssembly(width, count + 1, pruning.assembly, *inner)
            for layer in self.cuts.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1).to(x.dtype), x), 1)
        x = x + self._positions(grid)
        x = self._blocks(x) if self.pruning is None else self._pruned(x, grid)
        return x.transpose(1, 2).unflatten(-1, grid)

    def _positions(self, grid: Sequence[int]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.positions
        table = self.positions[:, 1:].transpose(1, 2).unflatten(-1, self.grid)
        mode = "bilinear" if len(grid) == 2 else "trilinear"
        table = functional.interpolate(table, tuple(grid), mode=mode)
        return torch.cat((self.positions[:, :1], table.flatten(2).transpose(1, 2)), 1)

    def _blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]

    def _pruned(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        pruning: Any = self.pruning
        cuts: Any = self.cuts
        norms: Any = self.left_norms
        assembly: Any = self.assembly
        batch, tokens = len(x), prod(grid)
        # The class token is at place 0.
        places = torch.arange(1, tokens + 1, device=x.device).expand(batch, -1)
        factors = torch.ones(batch, tokens, device=x.device)
        parts, all_places, cut = [], [], 0
        counts = pruning.kept(tokens)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in pruning.after:
                found: Split = cuts[cut](x[:, 1:], places, factors, counts[cut + 1])
                parts.append(norms[cut](found.left))
                cut += 1
                all_places.append(found.left_places)
                places, factors = found.kept_places, found.factors
                x = torch.cat((x[:, :1], found.kept), 1)
        first = places.new_zeros(batch, 1)
        return assembly([*parts, self.norm(x)], [*all_places, torch.cat((first, places), 1)], grid)


def _truncated(tensor: Tensor) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=STD)
