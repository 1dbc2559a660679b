"""The folder that an export writes: program, manifest, tokenizer, model card.

In come a `Quantized`, what a lowering says of its program, and a verification; out go files, which
become visible together or not at all, and for whoever reads them a `Bundle` with a typed
`Manifest`. Nobody else names the files of the folder or the keys of the manifest. `manifest` is
data alone and loads no torch; `record` makes it.
"""
