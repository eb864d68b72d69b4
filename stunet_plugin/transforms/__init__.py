"""Transforms of the pretext task: what the background workers do to a scan, and the fusion on the training device."""
