"""``stunet unlabeled``: folders of scans without labels become a dataset of nnU-Net, for
pretraining."""
