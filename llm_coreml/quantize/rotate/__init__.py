"""Rotations that are merged into the weights before they are quantized."""
