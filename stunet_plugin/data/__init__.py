"""Facts of the published weights, as data."""
