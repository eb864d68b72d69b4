"""Adaptation plan of nnssl: what a self-supervised checkpoint says of its network and images, read
from untrusted files and written into ours.

Facts from the published code: github.com/MIC-DKFZ/nnssl (adaptation_plan.py, AbstractTrainer.py),
and its reader in nnU-Net's development version (like_nnssl.py, pretrainedTrainer.py), which loads
files with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.topology import Strides, as_strides
from stunet_plugin.nnunet.names import AS_IN_FILE, READERS
from stunet_plugin.utils.validation import Fields, is_list
from stunet_plugin.weights.safe_loading import plain_copy

if TYPE_CHECKING:
    from stunet_plugin.weights.identify import NetworkWeights
    from stunet_plugin.weights.source_plan import SourcePlan

ENTRY = "nnssl_adaptation_plan"
ENCODER, STEM, DECODER = "encoder.stages", "encoder.stem", "decoder."
"""Where nnU-Net's networks and ours keep these parts; the stem may lie in the encoder."""
NO_SKIPS = "NoSkipResEncL"
"""A pretraining network whose decoder has no skips, so that only its encoder is of use."""
RESENC_L_POOLINGS: Strides = ((2, 2, 2),) * 5
"""Of the networks that nnssl calls ResEncL and NoSkipResEncL; their widths are in the weights."""
ISOTROPIC = "onemmiso"
"""nnssl's name for a spacing of 1 mm on all axes; ``median`` is that of a dataset."""


def adaptation_plan(checkpoint: Mapping[str, Any]) -> Fields | None:
    """Return the adaptation plan of a checkpoint as plain Python, None if it has none; raise for a
    network that nothing here can train."""
    if ENTRY not in checkpoint:
        return None
    plan = Fields(plain_copy(checkpoint[ENTRY], ENTRY), ENTRY)
    name = _architecture(plan).get("arch_class_name", "")
    if str(name).startswith("Primus"):
        raise PluginError(
            f"This nnssl checkpoint is of the transformer {name}. Only nnssl's ResEnc and U-Net"
            " checkpoints can be used here: take the ResEncL of the same pretraining."
        )
    return plan


def is_foreign(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether nnssl wrote a checkpoint, and not Volume Fusion of ours, which has a plan of
    nnU-Net beside such an entry."""
    arguments = checkpoint.get("init_args")
    return ENTRY in checkpoint and not (isinstance(arguments, dict) and "plans" in arguments)


def rename(weights: Mapping[Any, Any], plan: Fields) -> dict[Any, Any]:
    """Return encoder and stem, from where the plan says they are, and the decoder beside them if it
    can be used, under the names of nnU-Net's networks; the heads of pretext tasks are left out."""
    encoder, stem = plan.text("key_to_encoder"), plan.text("key_to_stem")
    moves = {f"{encoder}.": f"{ENCODER}.", f"{stem}.": f"{STEM}."}
    skips = _architecture(plan).get("arch_class_name", "") != NO_SKIPS
    if encoder.endswith(ENCODER) and skips:
        moves[encoder.removesuffix(ENCODER) + DECODER] = DECODER
    renamed = {}
    for name, value in weights.items():
        theirs = next((x for x in moves if isinstance(name, str) and name.startswith(x)), None)
        if theirs:
            renamed[moves[theirs] + name.removeprefix(theirs)] = value
    for key in (encoder, stem):
        if not any(isinstance(name, str) and name.startswith(f"{key}.") for name in weights):
            raise PluginError(f"{ENTRY} says that tensors are called {key!r}, but none is.")
    return renamed


def architecture_kwargs(plan: Fields) -> dict[str, Any]:
    """Return the arguments of the network that the plan names, empty if it gives none."""
    kwargs = _architecture(plan).get("arch_kwargs", None)
    return dict(kwargs) if isinstance(kwargs, Mapping) else {}


def read_plan(plan: Fields, weights: NetworkWeights, where: str) -> SourcePlan | None:
    """Return how the images of a pretraining were prepared; None where that is not fixed."""
    from stunet_plugin.weights import source_plan

    pretraining = plan.fields("pretrain_plan")
    name = next(iter(pretraining.fields("configurations").values), None)
    chosen = pretraining.fields("configurations").fields(name)
    poolings = weights.poolings or _poolings(plan, len(weights.features))
    # Images that were not resampled have no spacing in common.
    if poolings is None or chosen.get("spacing", None) is None:
        return None
    schemes = [str(x) for x in chosen.per_channel("normalization_schemes").values()]
    normalization = tuple(
        x if x in source_plan.NORMALIZATIONS and x != source_plan.CT else source_plan.ZSCORE
        for x in schemes * (weights.input_channels if len(schemes) == 1 else 1)
    )
    masks = chosen.get("use_mask_for_norm", False)
    mask = bool(masks[0] if is_list(masks) and masks else masks)
    reader = pretraining.get("image_reader_writer", None)
    return source_plan.SourcePlan(
        origin=where,
        spacing=chosen.positives("spacing", 3, whole=False),
        patch_size=plan.positives("recommended_downstream_patchsize", 3, whole=True),
        poolings=poolings,
        normalization=normalization,
        mask_for_norm=(mask,) * len(normalization),
        channel_names=tuple(f"channel_{x}" for x in range(len(normalization))),
        intensities=({},) * len(normalization),
        transpose_forward=pretraining.permutation("transpose_forward", 3, (0, 1, 2)),
        reader=reader if reader in READERS else AS_IN_FILE,
    )


def _poolings(plan: Fields, stages: int) -> Strides | None:
    """Return the poolings of an encoder whose decoder, which would tell them, is not there."""
    if strides := architecture_kwargs(plan).get("strides"):
        return as_strides(strides)[1:]
    known = _architecture(plan).get("arch_class_name", "") in ("ResEncL", NO_SKIPS)
    return RESENC_L_POOLINGS if known and stages == len(RESENC_L_POOLINGS) + 1 else None


def _architecture(plan: Fields) -> Fields:
    return plan.fields("architecture_plans")


def make_plan(
    plans: Mapping[str, Any], chosen: Mapping[str, Any], channels: int, network: Any
) -> dict[str, Any]:
    """Return the adaptation plan of a network that was trained here.

    Args:
        plans: of nnU-Net.
        chosen: their configuration, with the ``architecture`` of the network.
        channels: of the images.
        network: which says where its encoder, its stem and the convolutions of the channels are.
    """
    architecture, spacing = chosen["architecture"], [float(step) for step in chosen["spacing"]]
    style = ISOTROPIC if set(spacing) == {1.0} else "median"
    shared = ("data_identifier", "normalization_schemes", "use_mask_for_norm")
    resampling = {"data": "data", "seg": "mask"}  # nnU-Net's word to nnssl's
    configuration = {
        **{key: chosen.get(key) for key in shared},
        "preprocessor_name": chosen.get("preprocessor_name", "DefaultPreprocessor"),
        "spacing_style": style,
        "spacing": spacing,
        "patch_size": [int(size) for size in chosen["patch_size"]],
        **{
            f"resampling_fn_{theirs}{end}": chosen.get(f"resampling_fn_{ours}{end}")
            for ours, theirs in resampling.items()
            for end in ("", "_kwargs")
        },
    }
    copied = (
        "dataset_name",
        "plans_name",
        "original_median_spacing_after_transp",
        "image_reader_writer",
        "transpose_forward",
        "transpose_backward",
        "experiment_planner_used",
    )
    made = {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {
            **{key: plans.get(key) for key in copied},
            "configurations": {style: configuration},
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": configuration["patch_size"],
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,
    }
    return dict(plain_copy(made, ENTRY))


def without_numpy(value: Any) -> Any:
    """Return a copy of what a checkpoint holds with plain numbers in place of numpy's, so that it
    loads with ``weights_only=True``."""
    if isinstance(value, dict):
        return {without_numpy(key): without_numpy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_numpy(entry) for entry in value)
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
