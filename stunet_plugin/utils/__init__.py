"""Files, geometry, workers, progress, validation, figures and devices."""
