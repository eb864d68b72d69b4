"""Fine-tuning in one command."""
