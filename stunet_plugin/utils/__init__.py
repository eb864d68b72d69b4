"""Files, geometry, workers, validation, figures and devices."""
