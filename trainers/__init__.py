"""Trainers, as the package ``stunet_plugin.trainers``; nnU-Net finds them through ``stunet
register``.

nnU-Net also loads this folder by path (``nnUNet_extTrainer``), so the modules here import
absolutely.
"""

import sys as _sys
from typing import Any as _Any

from stunet_plugin.trainers import misfm_trainers as _misfm
from stunet_plugin.trainers import stunet_trainers as _stunet
from stunet_plugin.trainers import volume_fusion_trainers as _volume_fusion

_FAMILIES = (_stunet, _misfm, _volume_fusion)
"""Modules with a table ``TRAINERS`` and a function ``hint_for_unknown``; a new one becomes findable
by standing here."""

globals().update(
    {name: trainer for family in _FAMILIES for name, trainer in family.TRAINERS.items()}
)

__all__ = [name for family in _FAMILIES for name in family.TRAINERS]


def __getattr__(name: str) -> _Any:
    # nnU-Net looks for a trainer by hasattr on each module. It goes on looking after this one
    # (users derive their own), and its last word on a name that nobody knows does not say what
    # would be allowed; this does.
    for hint in filter(None, (family.hint_for_unknown(name) for family in _FAMILIES)):
        print(hint, file=_sys.stderr)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
