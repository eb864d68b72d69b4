"""Demo: an embedded dataset, and nnU-Net's own commands run on it."""
