"""``stunet segment``: structures in scans, by models that have names."""
