"""PCT-Net and FMUNet weights, read from checkpoints of PyMIC (the published ones) or of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.anisotropy import (
    MODE_PURPOSES,
    MODES,
    NUM_LEVELS,
    AnisotropyMode,
    get_mode,
)
from stunet_plugin.networks.from_plan import resolve
from stunet_plugin.networks.presets import FMUNET, PCTNET, MISFMPreset
from stunet_plugin.networks.topology import Strides
from stunet_plugin.weights.identify import (
    HEADS,
    NetworkWeights,
    Origin,
    check_convolutions,
    check_tensors,
    plain_tensor,
)
from stunet_plugin.weights.input_channels import MEAN

if TYPE_CHECKING:
    from torch import Tensor

NETWORKS: dict[Origin, MISFMPreset] = {
    Origin.PCTNET: PCTNET,
    Origin.OWN_PCTNET: PCTNET,
    Origin.FMUNET: FMUNET,
    Origin.OWN_FMUNET: FMUNET,
}
PYMIC_ORIGINS = (Origin.PCTNET, Origin.FMUNET)
"""Checkpoints that say nothing of the plan they were trained with, nor what their outputs mean."""

# Our modules whose convolutions show the width of each level, and where the attention heads of
# levels 2 to 4 show.
_STEM = "encoder.stages.0.0.weight"
_WIDTHS = {
    PCTNET: (_STEM, *(f"encoder.stages.{level}.1.conv.weight" for level in range(1, NUM_LEVELS))),
    FMUNET: (_STEM, *(f"encoder.stages.{level}.0.conv.weight" for level in range(1, NUM_LEVELS))),
}
_TABLES = tuple(
    f"encoder.stages.{level}.2.transformer.blocks.0.attention.relative_position_bias_table"
    for level in range(2, NUM_LEVELS)
)
_KERNELS = {
    PCTNET: (_STEM, "encoder.stages.1.1.conv.weight"),
    FMUNET: (_STEM, "encoder.stages.1.1.units.0.conv.weight"),
}
_LAST_HEAD = f"decoder.seg_layers.{NUM_LEVELS - 2}.conv.weight"


@dataclass(frozen=True)
class MISFMWeights(NetworkWeights):
    """The weights of one mode's PCT-Net or FMUNet under this plugin's names.

    Attributes:
        network: which of the two.
        mode: the anisotropy mode.
        num_heads: attention heads of levels 2 to 4; empty for FMUNet.
        outputs: 0 where the segmentation heads were left out, as an import of pretrained weights
            does.
    """

    network: MISFMPreset
    mode: AnisotropyMode
    num_heads: tuple[int, ...]

    @property
    def network_name(self) -> str:
        return f"a {self.network.name}"

    @property
    def trainer(self) -> str:
        return f"{self.network.name}Trainer"

    @property
    def plans_like(self) -> str:
        return f"{self.network.plans}_like_mode{self.mode.number}"

    @property
    def published_size(self) -> bool:
        return not self._unpublished()

    @property
    def description(self) -> str:
        size = "" if self.published_size else " of no published size"
        return (
            f"{self.network.name}{size} in mode {self.mode.number} (widths {list(self.features)}),"
            f" {self.parameters:,} parameters, {self.input_channels} input channel(s),"
            f" {f'{self.outputs} outputs' if self.outputs else 'heads left out'}"
        )

    @property
    def input_weights(self) -> tuple[str, ...]:
        return (_STEM,)

    @property
    def default_stem(self) -> str:
        # PCT-Net's batch norms have learned the stem's response; FMUNet's residuals pass it on.
        return MEAN

    @property
    def stages(self) -> int:
        return NUM_LEVELS

    @property
    def poolings(self) -> Strides:
        return self.mode.strides[1:]

    def architecture(self, strides: Strides) -> dict[str, Any]:
        entry = self.network.architecture(self.mode)
        return {**entry, "arch_kwargs": {**entry["arch_kwargs"], **self._unpublished()}}

    def check_plan(self, configuration: Mapping[str, Any]) -> None:
        resolve(configuration, self.network, self.trainer)

    def without_heads(self) -> MISFMWeights:
        """Return what serves every task."""
        kept = {name: value for name, value in self.tensors.items() if HEADS not in name}
        return replace(self, tensors=kept, outputs=0)

    def _unpublished(self) -> dict[str, Any]:
        """Arguments of the network that are not its defaults."""
        from stunet_plugin.networks import fmunet, pctnet

        published = pctnet.FEATURES if self.network is PCTNET else fmunet.FEATURES
        given: dict[str, Any] = (
            {} if self.features == published else {"features_per_stage": list(self.features)}
        )
        if self.num_heads and self.num_heads != pctnet.NUM_HEADS:
            given["num_heads"] = list(self.num_heads)
        return given


def read_misfm(
    origin: Origin,
    checkpoint: Mapping[str, Any],
    weights: dict[str, Any],
    path: Path,
    mode: int | None,
) -> MISFMWeights:
    """Read a PCT-Net or an FMUNet.

    Args:
        origin, weights: as identified in the checkpoint.
        checkpoint, path: as loaded, and its file.
        mode: anisotropy mode. A PyMIC checkpoint of PCT-Net holds all three, so it needs one; all
            others hold one, which their kernels tell, so None will do.

    Raises:
        PluginError: unknown mode; missing, unknown or misshapen tensors.
    """
    network = NETWORKS[origin]
    if mode is not None:
        get_mode(mode)
    elif origin is Origin.PCTNET:
        raise PluginError(
            f"{path} is a {origin.value}, which holds the stems and heads of all three anisotropy"
            f" modes. Choose yours with --mode: {MODE_PURPOSES}. {network.name}Trainer prints the"
            " mode that it takes for a plan."
        )
    try:
        if origin in PYMIC_ORIGINS:
            weights = _translate(origin, weights, mode)
        tensors = {name: plain_tensor(name, value) for name, value in weights.items()}
        found = _measure(origin, checkpoint, tensors)
        check_tensors(found)
    except PluginError as error:
        raise PluginError(f"{path} is refused as a {origin.value}: {error}") from error
    if mode is not None and found.mode.number != mode:
        raise PluginError(
            f"{path} holds a {network.name} in mode {found.mode.number}, not {mode}. Leave --mode"
            " out."
        )
    return found


def _translate(origin: Origin, published: dict[str, Any], mode: int | None) -> dict[str, Tensor]:
    """Return the published tensors under our names, those of one mode."""
    from stunet_plugin.weights import misfm_keys

    if origin is Origin.PCTNET:
        published = misfm_keys.used_in(published, mode or 0)
    tensors = {name: plain_tensor(name, value) for name, value in published.items()}
    if origin is Origin.FMUNET:
        return misfm_keys.translate_fmunet(tensors)
    return misfm_keys.translate_pctnet(tensors, mode or 0)


def _measure(
    origin: Origin, checkpoint: Mapping[str, Any], tensors: dict[str, Tensor]
) -> MISFMWeights:
    """Read sizes and mode off names and shapes."""
    network = NETWORKS[origin]
    tables = _TABLES if network is PCTNET else ()
    has_heads = any(".seg_layers." in name for name in tensors)
    convolutions = (*_WIDTHS[network], *_KERNELS[network], *((_LAST_HEAD,) if has_heads else ()))
    missing = [name for name in (*convolutions, *tables) if name not in tensors]
    if missing:
        raise PluginError(
            f"{len(missing)} tensors that tell its sizes are missing (for example {missing[0]})."
        )
    check_convolutions(tensors, convolutions)
    kernels = tuple(tuple(tensors[name].shape[2:]) for name in _KERNELS[network])
    mode = next((mode for mode in MODES if mode.kernel_sizes[:2] == kernels), None)
    if mode is None:
        given = [list(kernel) for kernel in kernels]
        raise PluginError(
            f"the kernels of its first two levels are {given}, which are those of no mode."
        )
    return MISFMWeights(
        origin,
        checkpoint,
        tensors,
        input_channels=int(tensors[_STEM].shape[1]),
        outputs=int(tensors[_LAST_HEAD].shape[0]) if has_heads else 0,
        network=network,
        mode=mode,
        features=tuple(int(tensors[name].shape[0]) for name in _WIDTHS[network]),
        num_heads=tuple(int(tensors[name].shape[-1]) for name in tables),
    )
