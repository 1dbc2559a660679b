"""Which rows of a decoder's matrices lie in parts of their own in its program.

cut_rows(decoder, cuts)                # {"lm_head.weight": [[0, 64, 96]]}
"""

from __future__ import annotations

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor

from llm_coreml.cuts import Cuts, unit_of_blocks
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Embedding, Linear
from llm_coreml.quantize.formats.lookup import LookupTensor


def cut_rows(decoder: Decoder, cuts: Cuts) -> dict[str, list[list[int]]]:
    """Return in which ways each matrix or table of a decoder may be cut, by its name.

    Args:
        decoder: Quantized.
        cuts: What is cut.
    """
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    found: dict[str, list[list[int]]] = {}
    for module in decoder.modules():
        if not isinstance(module, (Linear, Embedding)):
            continue
        rows, unit = module.weight.shape[0], unit_of(module.weight)
        bounds = (cuts.of_linear if isinstance(module, Linear) else cuts.of_table)(rows, unit)
        if len(bounds) > 2:
            bias = module.bias if isinstance(module, Linear) else None
            for part in (module.weight, bias):
                if part is not None:
                    found.setdefault(names[id(part)], []).append(bounds)
        beside = (module.down, module.up) if isinstance(module, Linear) else ()
        for factor in beside:
            # A layer of its own in the program.
            if factor is not None and len(bounds := cuts.of_linear(len(factor), 1)) > 2:
                found[names[id(factor)]] = [bounds]
    if cuts.gather is not None:
        for name, buffer in decoder.named_buffers():
            if buffer.ndim == 2 and len(bounds := cuts.of_table(buffer.shape[0], 1)) > 2:
                found[name] = [bounds]
    return found


def unit_of(weight: torch.Tensor) -> int:
    """Return how many rows of a matrix belong together, as they share a table or a scale."""
    if isinstance(weight, LookupTensor):
        scales = [] if weight.scale is None else [weight.scale.shape[0]]
        blocks, width = [weight.tables.shape[0], *scales], weight.tables.shape[3]
    elif isinstance(weight, CodebookQuantizedTensor):
        blocks, width = [weight.codebook.shape[0]], 1
    else:
        return 1
    return unit_of_blocks(weight.shape[0], blocks, width)
