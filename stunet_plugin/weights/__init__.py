"""Weights: untrusted checkpoints read, identified, imported."""
