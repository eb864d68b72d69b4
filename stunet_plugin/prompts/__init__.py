"""Prompts: channels beside the image's, drawn, simulated from labels, followed by a network."""
