"""Runners: one way to feed tokens to an artifact or to an eager decoder."""
