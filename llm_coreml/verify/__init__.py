"""Is the written file the model, and is it precise enough?

In come a runner of the file and the quantized decoder; out go figures with their bounds, or a
`VerificationError` that names the weight, token or position. A bound is never widened to pass.
"""
