"""Trackers: an evaluation as a run of W&B, Trackio, MLflow or TensorBoard.

A `Record` holds what is logged, a `Sink` logs it, and `tracking` sends one to the other, each
library in a process of its own.
"""
