"""The folder that an export writes: program, manifest, tokenizer, model card.

In come a `Quantized`, what a lowering says of its program, and a verification; out go files, which
become visible together or not at all, and for whoever reads them a `Bundle` with a typed
`Manifest`. The names of the folder's files are here alone, and so are the keys of the manifest, but
for its plan, which `quantize.plan.plan_file` makes and reads. `manifest` is data alone and loads no
torch; `record` makes it. An earlier bundle is replaced as a whole, or stays as it was.
"""
