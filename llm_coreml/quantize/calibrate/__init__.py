"""Codes and scales chosen for what a text makes of the layers.

In come a block with its weights and the text's hidden states; out go quantized weights in the same
formats and of the same size. Blocks are gone through by their own steps and wiring, so nothing here
knows a layer by name; a format is known by its grid alone.
"""
