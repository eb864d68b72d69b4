"""Experiment planners, the package ``stunet_plugin.plans``; ``stunet register`` shows them to
nnU-Net."""

from stunet_plugin.nnunet.registry import Registry as _Registry
from stunet_plugin.plans import misfm_planners as _misfm
from stunet_plugin.plans import prompt_planners as _prompt
from stunet_plugin.plans import stunet_planners as _stunet
from stunet_plugin.plans import unetr_planners as _unetr

PLANNERS = _Registry(
    "planner", _stunet.PLANNERS, _misfm.PLANNERS, _unetr.PLANNERS, _prompt.PLANNERS
)
globals().update(PLANNERS)

__all__ = list(PLANNERS)

__getattr__ = PLANNERS.module_getattr(__name__)
