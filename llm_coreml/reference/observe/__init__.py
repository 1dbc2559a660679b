"""What happens in a run: sizes of values, and where two runs part.

In come programs that run, and an observer called at every operation; out go figures, never the
values themselves. Nothing that is computed is changed.
"""
