"""Published weights as nnU-Net v2 model folders: ``stunet import``, ``stunet inspect``, ``stunet plan-like``."""
