"""``stunet crosseval``: models compared across datasets."""
