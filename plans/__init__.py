"""Experiment planners, as the package ``stunet_plugin.plans``; nnU-Net finds them through ``stunet register``."""

from stunet_plugin.plans.stunet_planners import *  # noqa: F403 - one class per size
from stunet_plugin.plans.stunet_planners import __all__ as __all__
