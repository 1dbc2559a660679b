"""Runners: one way to feed tokens to an artifact or to an eager decoder.

In come a program or a decoder, and what its description says of lengths and rows; out come rows of
logits and tokens. Bundles are not known here, only files and descriptions.
"""
