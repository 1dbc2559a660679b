"""An original that need not read a text twice: what its last block gives is kept on disk.

    reader = RememberedReader(EagerRunner(decoder, "eager"), sha256, Kept(folder), threads=1)
    reader.logits(window)

A row of logits takes 600 kB at a vocabulary of 150 thousand, and what the head is given for it some
8 kB. So that is kept, and the head computes logits of it anew: the same bits, at a hundredth of the
place and a fifth of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from llm_coreml.eval.kept import Kept, key_of
from llm_coreml.runtime.eager import EagerRunner


class RememberedReader:
    """An eager runner and what it has read before.

    Args:
        runner: Reads what is not kept.
        sha256: Of the weights.
        kept: Where.
        threads: Of torch, which decide the order of sums.

    Attributes:
        label: What produced the numbers.
    """

    def __init__(self, runner: EagerRunner, sha256: str, kept: Kept, threads: int) -> None:
        self._runner = runner
        self._kept = kept
        self.label = runner.label
        decoder = runner.decoder
        self._width = decoder.spec.hidden_size
        self._facts = {
            "what": "rows before the head",
            "weights": sha256,
            "spec": repr(decoder.spec),
            "context": str(runner.context),
            "threads": str(threads),
            "processor": torch.backends.cpu.get_cpu_capability(),
        }

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of the tokens, float32 `[tokens, vocab]`."""
        text = hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()
        key = key_of({**self._facts, "tokens": text})
        rows = self._rows(self._kept.load(key), len(tokens))
        if rows is None:
            rows = self._runner.hidden(tokens)
            self._kept.store(key, rows.numpy().tobytes())
        return self._runner.logits_of(rows)

    def _rows(self, data: bytes | None, count: int) -> torch.Tensor | None:
        """Return what was kept as float32 `[count, width]`."""
        if data is None or len(data) != 4 * count * self._width:
            return None
        # A copy lies where torch's own tensors lie, for products to sum in the same order.
        rows = torch.frombuffer(bytearray(data), dtype=torch.float32).clone()
        return rows.reshape(count, self._width)
