"""Segmentation heads at the start of fine-tuning: by name, or fitted to voxels."""
