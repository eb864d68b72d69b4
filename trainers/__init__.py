"""Trainers, as the package ``stunet_plugin.trainers``; nnU-Net finds them through ``stunet register``.

nnU-Net also loads this folder by path (``nnUNet_extTrainer``), so the modules here import absolutely.
"""

from stunet_plugin.trainers.stunet_trainers import *  # noqa: F403 - one class per size and schedule
from stunet_plugin.trainers.stunet_trainers import __all__ as __all__
