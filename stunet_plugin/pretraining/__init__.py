"""Volume Fusion: pretraining without labels."""
