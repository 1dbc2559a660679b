"""A whole method of a `.pte`: ExecuTorch's kernels and Core ML delegates, in the plan's order.

In come a parsed method and its packages; out comes something to call with tensors. Nothing is
assumed about the plan: what is unknown is an error when the method is loaded.
"""
