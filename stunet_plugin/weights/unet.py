"""Weights of nnU-Net's own networks, PlainConvUNet and ResidualEncoderUNet, from checkpoints of
nnU-Net v2 and nnssl. Sizes are read off the tensors, the rest is nnU-Net's custom or the plan's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.from_plan import HOST_ARCHITECTURES
from stunet_plugin.utils.validation import Fields, is_number
from stunet_plugin.weights import identify, nnssl
from stunet_plugin.weights.identify import is_decoder
from stunet_plugin.weights.read_plans import resolve_configuration
from stunet_plugin.weights.tensors import DIMENSIONS, check_convolutions, plain_tensors

_CONVS = {
    "PlainConvUNet": "encoder.stages.{}.0.convs.{}.conv.weight",
    "ResidualEncoderUNet": "encoder.stages.{}.blocks.{}.conv1.conv.weight",
}
"""Convolutions of the encoder's stages and blocks, which tell widths, kernels and depths."""
_DEPTHS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
_DECODER_CONVS, _UPSAMPLING = "decoder.stages.{}.convs.{}.conv.weight", "decoder.transpconvs"
_USUAL_DECODER = {"PlainConvUNet": 2, "ResidualEncoderUNet": 1}
"""Convolutions per stage of nnU-Net's decoders, for encoders that come without one."""
_FIRST = {
    "PlainConvUNet": "encoder.stages.0.0.convs.0",
    "ResidualEncoderUNet": "encoder.stem.convs.0",
}
"""The block with the convolution that sees the image, which has two names in a state dict."""
_ENCODER_AGAIN = "decoder.encoder."
"""The decoder of these networks holds the encoder too, so that its tensors have two names."""

_CUSTOM: dict[str, Any] = {
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""What no tensor tells; every planner of nnU-Net, and nnssl, set this."""
_NONLINEARITIES = {
    f"torch.nn.{path}{x}" for path in ("", "modules.activation.") for x in ("LeakyReLU", "ReLU")
}
_KEYWORDS = ("eps", "affine", "momentum", "inplace", "negative_slope")


def read_unet(
    origin: identify.Origin, checkpoint: Mapping[str, Any], weights: dict[str, Any]
) -> identify.NetworkWeights:
    """Read sizes off names and shapes of weights that were identified in a checkpoint."""
    tensors = plain_tensors(weights)
    kind = next(kind for kind, name in _FIRST.items() if f"{name}.conv.weight" in tensors)
    encoder_only = not any(map(is_decoder, tensors))
    if encoder_only:
        tensors = {x: y for x, y in tensors.items() if not x.startswith(_ENCODER_AGAIN)}
    depths, decoder_depths = _depths(_CONVS[kind], tensors), _depths(_DECODER_CONVS, tensors)
    stages, steps = len(depths), len(decoder_depths)
    if stages < 2 or (steps != stages - 1 and not encoder_only):
        raise PluginError(
            f"its {stages} encoder and {steps} decoder stages are not those of a {kind}, which has"
            " one fewer of the latter."
        )
    firsts = [_CONVS[kind].format(stage, 0) for stage in range(stages)]
    upsampling = [f"{_UPSAMPLING}.{step}.weight" for step in range(steps)]
    heads = [f"decoder.seg_layers.{step}.weight" for step in range(steps)]
    heads = heads if heads and heads[-1] in tensors else []
    check_convolutions(tensors, (*firsts, *upsampling, *heads))
    features = tuple(int(tensors[name].shape[0]) for name in firsts)
    first = _FIRST[kind]
    batch_norm = f"{first}.norm.running_mean" in tensors
    norm = "batchnorm.Batch" if batch_norm else "instancenorm.Instance"
    kwargs = {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{DIMENSIONS}d",
        "kernel_sizes": [list(tensors[name].shape[2:]) for name in firsts],
        "strides": [[1] * DIMENSIONS for _ in firsts],
        _DEPTHS[kind]: list(depths),
        "n_conv_per_stage_decoder": list(decoder_depths) or [_USUAL_DECODER[kind]] * (stages - 1),
        "conv_bias": f"{first}.conv.bias" in tensors,
        "norm_op": f"torch.nn.modules.{norm}Norm{DIMENSIONS}d",
        **_taken_from_plan(checkpoint),
    }
    entry = {
        "network_class_name": f"{HOST_ARCHITECTURES}{kind}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    inputs = [f"{first}.{layer}.weight" for layer in ("conv", "all_modules.0")]
    again = [f"{_ENCODER_AGAIN}{name.removeprefix('encoder.')}" for name in inputs]
    return identify.NetworkWeights(
        origin=origin,
        checkpoint=checkpoint,
        tensors=tensors,
        title=f"{kind} (widths {list(features)}, depths {list(depths)})",
        preset=None,
        published_size=False,
        mode=None,
        trainer="PlannedTrainer",
        plans_like=f"{kind}Plans_like_model",
        features=features,
        input_weights=tuple(name for name in (*inputs, *again) if name in tensors),
        default_stem="mean",  # as nnU-Net's reader of nnssl does
        outputs=int(tensors[heads[-1]].shape[0]) if heads else 0,
        entry=entry,
        encoder_only=encoder_only,
        upsampling=tuple(tuple(tensors[name].shape[2:]) for name in upsampling[::-1]),
    )


def _depths(pattern: str, names: Collection[str]) -> tuple[int, ...]:
    """Return the number of convolutions or blocks of each stage."""
    counts: list[int] = []
    while pattern.format(len(counts), 0) in names:
        depth = 1
        while pattern.format(len(counts), depth) in names:
            depth += 1
        counts.append(depth)
    return tuple(counts)


def _taken_from_plan(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what no tensor tells from the plan in the checkpoint, where it has one; refuse what
    nnU-Net's planners never plan, as the network would be another."""
    kwargs = _planned_kwargs(checkpoint)
    taken = {key: kwargs.get(key, usual) for key, usual in _CUSTOM.items()}
    fields = Fields(taken, "the plan in the checkpoint")
    fields.choice("nonlin", _NONLINEARITIES)
    if taken["dropout_op"] is not None:
        raise fields.wrong("dropout_op", "null, as in nnU-Net's plans")
    taken["dropout_op_kwargs"] = None
    for key in ("norm_op_kwargs", "nonlin_kwargs"):
        values = fields.fields(key).values
        plain = all(isinstance(x, bool) or is_number(x) for x in values.values())
        if not plain or not set(values) <= set(_KEYWORDS):
            raise fields.wrong(key, f"numbers for some of {', '.join(_KEYWORDS)}")
        taken[key] = dict(values)
    if "nonlin_first" in kwargs:
        taken["nonlin_first"] = Fields(kwargs, fields.where).boolean("nonlin_first")
    return taken


def _planned_kwargs(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of the network in nnU-Net's or nnssl's plan in a checkpoint, empty where
    neither is there, or where the plan is from before nnU-Net 2.3."""
    arguments = identify.training_arguments(checkpoint)
    if isinstance(plans := arguments.get("plans"), dict):
        name = str(arguments.get("configuration"))
        chosen = resolve_configuration(Fields(plans, "the plan in the checkpoint"), name)
        architecture = chosen.get("architecture", None)
        kwargs = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
        return kwargs if isinstance(kwargs, Mapping) else {}
    plan = nnssl.adaptation_plan(checkpoint)
    return nnssl.architecture_kwargs(plan) if plan else {}
