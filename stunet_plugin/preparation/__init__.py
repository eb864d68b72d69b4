"""Preparation of a dataset for pretrained weights: plans that these fit, preprocessing."""
