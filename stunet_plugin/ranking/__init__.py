"""``stunet rank``: which pretrained weights suit a dataset, before any training."""
