"""Datasets in nnU-Net's raw format: reading them, and making new ones of predictions and of other
datasets."""
