"""Translation of published checkpoints, apart from the networks that they fit."""
