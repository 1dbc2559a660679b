"""Rotations that are merged into the weights before they are quantized.

In come a view of weights and the decoder's wiring; out goes another view of the same kind, for a
decoder that computes the same.
"""
