"""Interactive segmentation: a promptable model on a scan, and in other programs."""
