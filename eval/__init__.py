"""Measure an artifact: perplexity, divergence from the original, latency, size."""
