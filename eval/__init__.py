"""Measure an artifact: perplexity, divergence from the original, latency, size.

In come a bundle, and the model that it came from where there is one; out go dataclasses and
`results.json`. The file itself is measured, and each figure says what produced it. A figure of
quality is a record in `metrics`.
"""
