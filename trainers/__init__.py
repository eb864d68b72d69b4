"""Trainers, the package ``stunet_plugin.trainers``; ``stunet register`` shows them to nnU-Net.

nnU-Net also loads this folder by path (``nnUNet_extTrainer``), so the modules here import
absolutely.
"""

from stunet_plugin.nnunet.registry import Registry as _Registry
from stunet_plugin.trainers import misfm_trainers as _misfm
from stunet_plugin.trainers import option_trainers as _options
from stunet_plugin.trainers import planned_trainers as _planned
from stunet_plugin.trainers import prompt_trainers as _prompt
from stunet_plugin.trainers import sammed2d_trainers as _sammed2d
from stunet_plugin.trainers import self_training_trainers as _self_training
from stunet_plugin.trainers import stunet_trainers as _stunet
from stunet_plugin.trainers import unetr_trainers as _unetr
from stunet_plugin.trainers import volume_fusion_trainers as _volume_fusion

TRAINERS = _Registry(
    "trainer",
    _stunet.TRAINERS,
    _misfm.TRAINERS,
    _planned.TRAINERS,
    _options.TRAINERS,
    _unetr.TRAINERS,
    _volume_fusion.TRAINERS,
    _prompt.TRAINERS,
    _sammed2d.TRAINERS,
    _self_training.TRAINERS,
)
globals().update(TRAINERS)

__all__ = list(TRAINERS)

__getattr__ = TRAINERS.module_getattr(__name__)
