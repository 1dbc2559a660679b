"""A whole method of a `.pte`: ExecuTorch's kernels and Core ML delegates, in the plan's order."""
