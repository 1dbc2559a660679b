"""From a decoder to the bytes of an ExecuTorch program.

In come a quantized decoder and a `Job`; out go a file, the same for the same decoder, and a
`Description` of what it offers. `forms` chooses and describes; what loads coremltools, ExecuTorch
or XNNPACK is imported where it is called. The decoder is not changed, but for the twin, which
leaves it with dense weights.
"""
