"""SAM-Med2D in use and in training: images, prompts, loss, evaluation, sessions."""
