"""Training in the processes that torchrun starts."""
