"""Trained models run on images."""
