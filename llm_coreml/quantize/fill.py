"""Fill a decoder with weights, one matrix at a time, quantizing each as it arrives.

    decoder = Decoder(spec, context)
    fill(decoder, model.weights, plan, torch.float16)

At no time is more than one matrix held unquantized, or one block if it is calibrated. With a cache,
the matrices of a block that was quantized before are read from there, and all others are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import nn

from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.decoder import Decoder
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.cache import WeightCache
from llm_coreml.quantize.calibrate.calibration import Calibration
from llm_coreml.quantize.formats.round import quantize_weight
from llm_coreml.quantize.formats.schemes import Scheme, Unquantized
from llm_coreml.quantize.kept_codes import KeptCodes
from llm_coreml.quantize.keys import Keys
from llm_coreml.quantize.plan.imported import imported_weight, set_input_order
from llm_coreml.quantize.plan.plan import QuantizationPlan


def fill(
    decoder: Decoder,
    weights: Weights,
    plan: QuantizationPlan | None,
    storage: torch.dtype | None,
    on_progress: Callable[[float], None] = lambda _: None,
    windows: Sequence[Sequence[int]] | None = None,
    cache: WeightCache | None = None,
    kept: KeptCodes | None = None,
) -> None:
    """Read every parameter of `decoder`, quantizing by `plan`.

    Args:
        decoder: As constructed, without weights.
        weights: Where they come from.
        plan: Schemes; None leaves every matrix as it is stored.
        storage: Type in which unquantized matrices are held, and to which norms and biases are
            rounded; None keeps matrices as the checkpoint does and the others in fp32.
        on_progress: Called with the share of parameters done, 0 to 1.
        windows: Tokens of a text on which to calibrate the blocks, see `Calibration`; a block is
            held unquantized while it is calibrated.
        cache: Where quantized matrices are looked up and kept, a block at a time.
        kept: Whose codes quantized matrices get; None chooses them.

    Raises:
        CheckpointError: a tensor, or a layer's inputs, are not finite.
        UnsupportedError: a scheme cannot hold a value of a tensor.
    """
    filling = _Filling(decoder, weights, plan, storage, windows, cache, kept)
    held = weights.names()
    # A tied head is named by no view; that nothing else is left out, opening a model has checked.
    names = [name for name, _ in decoder.named_parameters() if name in held]
    total = sum(parameter.numel() for parameter in decoder.parameters())
    done = 0
    # A calibrated block reads what the token table and the blocks before it give.
    for index, members in groupby(sorted(names, key=_block_of), key=_block_of):
        for name in filling.group(index, list(members)):
            done += decoder.get_parameter(name).numel()
            on_progress(done / total)
    if decoder.spec.tie_word_embeddings:
        filling.tie()
    on_progress(1.0)


class _Filling:
    """What is read and quantized for one decoder, block by block; see `fill`."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        plan: QuantizationPlan | None,
        storage: torch.dtype | None,
        windows: Sequence[Sequence[int]] | None,
        cache: WeightCache | None,
        kept: KeptCodes | None,
    ) -> None:
        self._decoder = decoder
        self._modules = dict(decoder.named_modules())
        self._weights = weights
        self._plan = plan
        self._storage = storage
        self._windows = None if plan is None else windows
        self._cache = cache
        self._kept = kept
        codes = None if kept is None else kept.sha256
        self._keys = Keys(decoder, weights, plan, storage, self._windows, codes)
        self._packed = weights.forms().keys() if plan is not None else frozenset()
        self._calibration: Calibration | None = None
        self._passed = 0  # blocks that the calibration text has passed

    def group(self, index: int, members: list[str]) -> Iterator[str]:
        """Set the parameters of a block, or of what is in none (-1), and yield their names."""
        calibrated = self._windows is not None and index >= 0
        # What is quantized already costs nothing to read again.
        made = [name for name in members if name not in self._packed]
        matrices = [_owner(name) for name in made if name.endswith(".weight")]
        owners = [owner for owner in matrices if self._scheme_of(owner)]
        kept = self._cache is not None and (owners or calibrated)
        key = self._keys.block(members, owners, calibrated) if kept else None
        weights = self._load(key, owners)
        for name in members:
            owner, _, attribute = name.rpartition(".")
            module = self._modules[owner]
            if weights is not None and attribute == "weight" and owner in weights:
                _set(module, weights[owner])
            else:
                scheme = None if calibrated else self._scheme_of(owner)
                order = self._read(module, name, scheme)
                if attribute == "weight" and _is_matrix(module):
                    set_input_order(self._decoder, owner, order)
            yield name
        if weights is None and calibrated:
            self._calibrate(index)
        if weights is None and key:
            self._keep(key, owners)

    def tie(self) -> None:
        """Give the head the token table: the same tensor, or a second one in its own format."""
        head, table = self._decoder.lm_head, "embed_tokens.weight"
        if self._plan is None or self._plan.tied:
            head.weight = self._decoder.embed_tokens.weight
            return
        scheme = self._scheme_of("lm_head")
        packed = table in self._packed
        kept = self._cache is not None and scheme is not None and not packed
        key = self._keys.block([table], ["lm_head"], calibrated=False) if kept else None
        weights = self._load(key, ["lm_head"])
        if weights is not None:
            _set(head, weights["lm_head"])
            return
        self._read(head, table, scheme)
        if key:
            self._keep(key, ["lm_head"])

    def _scheme_of(self, owner: str) -> Scheme | None:
        """Return the format of a module's weight, None where it is not quantized."""
        if self._plan is None or not _is_matrix(self._decoder.get_submodule(owner)):
            return None
        scheme = self._plan.scheme_of(owner)
        return None if isinstance(scheme, Unquantized) else scheme

    def _load(self, key: str | None, owners: list[str]) -> dict[str, torch.Tensor] | None:
        """Return the kept weights of modules, None if there are none, or those of others."""
        found = self._cache.load(key) if self._cache and key else None
        shapes = {owner: self._modules[owner].get_parameter("weight").shape for owner in owners}
        if found is None or {owner: weight.shape for owner, weight in found.items()} != shapes:
            return None
        return found

    def _keep(self, key: str, owners: list[str]) -> None:
        """Store the weights of modules, and hold them from then on as the cache does."""
        assert self._cache is not None
        modules = {owner: self._decoder.get_submodule(owner) for owner in owners}
        weights = {owner: module.get_parameter("weight") for owner, module in modules.items()}
        for owner, weight in self._cache.store(key, weights).items():
            _set(modules[owner], weight)

    def _calibrate(self, index: int) -> None:
        assert self._plan is not None and self._windows is not None
        if self._calibration is None:
            codes = None if self._kept is None else self._kept.like
            self._calibration = Calibration(self._decoder, self._windows, codes)
        # Blocks that were in the cache: the text passes them only once one is met that was not.
        for earlier in range(self._passed, index):
            self._calibration.advance(self._decoder.layers[earlier], self._original(earlier))
        self._calibration.quantize(index, self._plan.scheme_of)
        self._passed = index + 1

    def _original(self, index: int) -> nn.Module:
        """Return a quantized block as it was before."""
        block = copy.deepcopy(self._decoder.layers[index])
        prefix = f"layers.{index}."
        for inner, _ in block.named_parameters():
            name = prefix + inner
            if self._scheme_of(_owner(name)):
                self._read(block.get_submodule(_owner(inner)), name, None)
        return block

    def _read(self, module: nn.Module, name: str, scheme: Scheme | None) -> torch.Tensor | None:
        """Give a module the parameter `name`, and quantize it if there is a format for it.

        Returns:
            The order of a matrix's inputs, None if that is their own; see `set_input_order`.
        """
        attribute = name.rpartition(".")[2]
        if attribute != "weight" or not _is_matrix(module):
            # Computed with in fp32, but with the values that the program holds.
            values = self._weights.tensor(name, self._storage or torch.float32)
            values = values.to(torch.float32)
            setattr(module, attribute, nn.Parameter(values, requires_grad=False))
            return None
        packed = None if scheme is None else self._weights.packed(name)
        if scheme is not None and packed is not None:
            _set(module, imported_weight(packed, scheme.bits))
            return packed.order
        # Read in the program's own precision, which finds values that it cannot hold.
        dtype = self._storage or self._weights.dtype(name)
        _set(module, self._weights.tensor(name, dtype))
        if scheme is None:
            return None
        try:
            if self._kept is None:
                quantize_weight(module, scheme)
            else:
                _set(module, self._kept.fitted(module.get_parameter("weight").detach(), scheme))
        except UnsupportedError as error:
            raise UnsupportedError(f"{self._weights.described(name)}: {error}") from error
        return None


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding))


def _set(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _block_of(name: str) -> int:
    """Return the index of the block that a parameter belongs to, -1 if to none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1
