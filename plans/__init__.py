"""Experiment planners, as the package ``stunet_plugin.plans``; nnU-Net finds them through ``stunet
register``."""

import sys as _sys
from typing import Any as _Any

from stunet_plugin.plans import misfm_planners as _misfm
from stunet_plugin.plans import stunet_planners as _stunet
from stunet_plugin.plans.base_planner import hint_for_unknown as _hint_for_unknown

PLANNERS = {**_stunet.PLANNERS, **_misfm.PLANNERS}
globals().update(PLANNERS)

__all__ = list(PLANNERS)


def __getattr__(name: str) -> _Any:
    # As for the trainers: nnU-Net goes on looking after this module, and its own last word on an
    # unknown planner is that None cannot be called.
    hint = _hint_for_unknown(name, PLANNERS)
    if hint:
        print(hint, file=_sys.stderr)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
