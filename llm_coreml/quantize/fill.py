"""Fill a decoder from a checkpoint, one matrix at a time, quantizing each as it arrives.

    decoder = Decoder(spec, context)
    fill(decoder, checkpoint, family, plan, torch.float16)

At no time is more than one matrix held unquantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from llm_coreml.checkpoint import Checkpoint, check_tensors
from llm_coreml.decoder import Decoder
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import Family
from llm_coreml.quantize.apply import quantize_weight
from llm_coreml.quantize.calibration import Calibration
from llm_coreml.quantize.imported import imported_weight, set_input_order
from llm_coreml.quantize.plan import QuantizationPlan
from llm_coreml.quantize.schemes import Scheme, Unquantized


def check_checkpoint(decoder: Decoder, checkpoint: Checkpoint, family: Family) -> dict[str, str]:
    """Hold the checkpoint's names and shapes against the decoder's, without reading data.

    Returns:
        Decoder name -> checkpoint name.

    Raises:
        CheckpointError: tensors are missing, surplus or misshapen; all of them are named.
    """
    names = family.tensor_names(decoder.spec)
    parameters = dict(decoder.named_parameters())
    expected = {theirs: tuple(parameters[ours].shape) for ours, theirs in names.items()}
    check_tensors(checkpoint, expected, optional=family.ignored)
    return names


def fill(
    decoder: Decoder,
    checkpoint: Checkpoint,
    family: Family,
    plan: QuantizationPlan | None,
    storage: torch.dtype | None,
    on_progress: Callable[[float], None] = lambda _: None,
    windows: Sequence[Sequence[int]] | None = None,
) -> None:
    """Read every parameter of `decoder`, quantizing by `plan`.

    Args:
        decoder: As constructed, without weights.
        checkpoint: Where they come from.
        family: Names them.
        plan: Schemes; None leaves every matrix as it is stored.
        storage: Type in which unquantized matrices are held, and to which norms and biases are
            rounded; None keeps matrices as the checkpoint does and the others in fp32.
        on_progress: Called with the share of parameters done, 0 to 1.
        windows: Tokens of a text on which to calibrate the blocks, see `Calibration`; a block is
            held unquantized while it is calibrated.

    Raises:
        CheckpointError: a tensor is missing, misshapen, surplus or not finite, or a layer's inputs
            are not finite.
        UnsupportedError: a scheme cannot hold a value of a tensor.
    """
    names = check_checkpoint(decoder, checkpoint, family)
    modules = dict(decoder.named_modules())
    total = sum(parameter.numel() for parameter in decoder.parameters())
    done = 0
    # A calibrated block reads what the token table and the blocks before it give.
    ordered = sorted(names, key=_block_of)
    ends = {_block_of(name): name for name in ordered}
    calibration: Calibration | None = None
    at_once = plan
    if plan is not None and windows is not None:
        at_once = replace(plan, linear=Unquantized(), exceptions={})
    for ours in ordered:
        theirs, block = names[ours], _block_of(ours)
        owner, _, attribute = ours.rpartition(".")
        module = modules[owner]
        if attribute == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
            scheme = Unquantized() if at_once is None else at_once.scheme_of(owner)
            order = _set_matrix(module, checkpoint, theirs, scheme, storage)
            set_input_order(modules, owner, order)
        else:
            # Computed with in fp32, but with the values that the program holds.
            values = checkpoint.tensor(theirs, storage or torch.float32).to(torch.float32)
            setattr(module, attribute, nn.Parameter(values, requires_grad=False))
        if plan is not None and windows is not None and block >= 0 and ends[block] == ours:
            calibration = calibration or Calibration(decoder, windows)
            calibration.quantize(block, plan.scheme_of)
        done += module.get_parameter(attribute).numel()
        on_progress(done / total)
    decoder.cache.reset()
    if decoder.spec.tie_word_embeddings:
        _tie(decoder, checkpoint, names, plan, storage)
    on_progress(1.0)


def _block_of(name: str) -> int:
    """Return the index of the block that a parameter belongs to, -1 if to none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def _set_matrix(
    module: nn.Linear | nn.Embedding,
    checkpoint: Checkpoint,
    name: str,
    scheme: Scheme,
    storage: torch.dtype | None,
) -> torch.Tensor | None:
    """Set a module's weight, and return the order of its inputs if that is not their own."""
    if isinstance(scheme, Unquantized):
        weight = checkpoint.tensor(name, storage or checkpoint.dtype(name))
        module.weight = nn.Parameter(weight, requires_grad=False)
        return None
    packed = checkpoint.packed(name)
    if packed is not None:
        module.weight = nn.Parameter(imported_weight(packed, scheme.bits), requires_grad=False)
        return packed.order
    # Read in the program's own precision, which finds values that it cannot hold.
    weight = checkpoint.tensor(name, storage or checkpoint.dtype(name))
    module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        quantize_weight(module, scheme)
    except UnsupportedError as error:
        raise UnsupportedError(f"'{name}' in {checkpoint.where(name)}: {error}") from error
    return None


def _tie(
    decoder: Decoder,
    checkpoint: Checkpoint,
    names: dict[str, str],
    plan: QuantizationPlan | None,
    storage: torch.dtype | None,
) -> None:
    """Give the head the token table: the same tensor, or a second one in its own format."""
    if plan is None or plan.tied:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    else:
        table = names["embed_tokens.weight"]
        _set_matrix(decoder.lm_head, checkpoint, table, plan.lm_head, storage)
