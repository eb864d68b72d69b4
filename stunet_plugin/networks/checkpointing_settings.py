"""The settings of activation checkpointing: what the forward pass keeps, and what the backward pass
computes again.

Words alone, without torch: options, the memory estimate, the network and the trainers all speak of
    them. (Checkpoints as files of a
training are in ``stunet_plugin.weights``.)
"""

OFF = "off"
"""Everything is kept."""
STAGE = "stage"
"""The output of each stage is kept; what is inside of one stage at a time exists a second time in
the backward pass."""
BLOCK = "block"
"""The output of each residual block is kept; more than with STAGE, but a single block is computed
again at a time."""

SETTINGS = (OFF, STAGE, BLOCK)

AUTO = "auto"
"""The trainer chooses one of SETTINGS by the free memory."""
