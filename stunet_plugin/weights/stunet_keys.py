"""Parameter names of the published STU-Net, translated to ours. Pure functions from a state dict to
a state dict.

Published names (nnU-Net v1 checkpoints and the published v2 port alike; i encoder stage, u decoder
step from the deepest, j block): ``conv_blocks_context.i.j.{conv1,norm1,conv2,norm2,conv3}`` with
conv3 the shortcut, ``upsample_layers.u.conv``, ``conv_blocks_localization.u.j.{...}``,
``seg_outputs.u`` (the last is full resolution).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from stunet_plugin.errors import PluginError

Value = TypeVar("Value")

_RULES = (
    (
        re.compile(r"conv_blocks_context\.(\d+)\.(\d+)\.(conv1|norm1|conv2|norm2|conv3)\.(\w+)"),
        r"encoder.stages.\1.\2.\3.\4",
    ),
    (re.compile(r"upsample_layers\.(\d+)\.conv\.(\w+)"), r"decoder.upsample_convs.\1.\2"),
    (
        re.compile(
            r"conv_blocks_localization\.(\d+)\.(\d+)\.(conv1|norm1|conv2|norm2|conv3)\.(\w+)"
        ),
        r"decoder.stages.\1.\2.\3.\4",
    ),
    (re.compile(r"seg_outputs\.(\d+)\.(\w+)"), r"decoder.seg_layers.\1.\2"),
)


def translate_key(key: str) -> str:
    """Return our name of a published parameter.

    Raises:
        PluginError: the name is not one of the published STU-Net's.
    """
    for pattern, replacement in _RULES:
        if pattern.fullmatch(key):
            return pattern.sub(replacement, key).replace(".conv3.", ".shortcut.")
    raise PluginError(
        f"{key!r} is not a parameter of the published STU-Net (expected conv_blocks_context,"
        " upsample_layers, conv_blocks_localization or seg_outputs). Is this the checkpoint of"
        " another network?"
    )


def translate_state_dict(published: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same tensors under our names; nothing is copied.

    Raises:
        PluginError: a name is unknown, or two names lead to the same parameter.
    """
    translated = {translate_key(key): value for key, value in published.items()}
    if len(translated) != len(published):
        raise PluginError("The checkpoint names the same parameter twice.")
    return translated
