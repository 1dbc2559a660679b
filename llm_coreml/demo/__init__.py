"""A small Llama that ships in the package, and its texts: data, and no code.

Nothing comes in; out go a checkpoint like any other, a held-out text to measure on and a text to
calibrate on. The files are what `scripts/demo/` wrote: they are made anew there and never edited,
for recorded figures and hashes follow from their bytes.
"""
