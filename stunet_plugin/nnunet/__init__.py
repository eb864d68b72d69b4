"""nnU-Net, as installed: registration, checks, commands, names."""
