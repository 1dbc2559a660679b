"""What quantized weights are kept under: a hash of everything that they follow from.

    keys = Keys(decoder, weights, plan, storage, windows)
    key = keys.block(["embed_tokens.weight"], ["embed_tokens"], calibrated=False)

A calibrated block follows from the blocks before it too, so its key holds the key before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.decoder import Decoder
from llm_coreml.quantize.cache import make_key
from llm_coreml.quantize.plan.plan import QuantizationPlan, beside_blocks


class Keys:
    """The keys of one decoder's matrices, for blocks that come in order; see `fill`.

    `codes` is the hash of the program whose codes are kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        plan: QuantizationPlan | None,
        storage: torch.dtype | None,
        windows: Sequence[Sequence[int]] | None,
        codes: str | None = None,
    ) -> None:
        self._decoder = decoder
        self._weights = weights
        self._plan = plan
        self._storage = storage
        self._windows = windows
        self._codes = {} if codes is None else {"codes": codes}
        self._before = ""

    def block(self, members: list[str], owners: list[str], calibrated: bool) -> str:
        """Return the key of some matrices.

        Args:
            members: Parameters that they follow from.
            owners: Their modules.
            calibrated: They are a block through which the calibration text passes.
        """
        assert self._plan is not None
        facts = {
            "tensors": self._weights.sha256(members),
            "schemes": repr([(owner, self._plan.scheme_of(owner)) for owner in owners]),
            "storage": str(self._storage),
            **self._codes,
        }
        if not calibrated:
            return make_key(facts)
        self._before = make_key({**facts, "before": self._before or self._begin()})
        return self._before

    def _begin(self) -> str:
        """Return what the text is when it meets the first block, and how blocks compute."""
        names, before = sorted(self._weights.names()), ("embed_", "per_layer.")
        entering = [name for name in names if name.startswith(before)]
        owners = ["embed_tokens", *(name for name, _ in beside_blocks(self._decoder.spec))]
        table = self.block(entering, owners, calibrated=False)
        # What is as ever is not named, so that keys are what they were.
        further = {self._decoder.norm.form, self._decoder.operations} - {"scaled", "usual"}
        forms = self._decoder.attention, *sorted(further)
        decoder = repr((self._decoder.spec, *forms))
        return make_key({"table": table, "decoder": decoder, "text": repr(self._windows)})
