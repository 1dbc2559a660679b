"""Windows of an evaluation that were scored before it was interrupted.

    finished = FinishedWindows(kept, facts)
    data = finished.load(window)
    finished.store(window, data)
    finished.forget()

They are kept until the results are written, under all that their figures follow from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from llm_coreml.eval.kept import Kept, key_of
from llm_coreml.eval.window_scores import ModelScores, unpacked


class FinishedWindows:
    """Scores of windows by models that do not change.

    Args:
        kept: Where.
        facts: What the figures follow from besides the windows, by name.
    """

    def __init__(self, kept: Kept, facts: Mapping[str, str]) -> None:
        self._kept, self._facts = kept, facts
        self._keys: set[str] = set()

    def load(self, window: Sequence[int]) -> dict[str, ModelScores] | None:
        """Return the scores of a window, None if it was not finished."""
        data = self._kept.load(self._key(window))
        try:
            return None if data is None else unpacked(data)
        except ValueError:
            return None

    def store(self, window: Sequence[int], data: bytes) -> None:
        """Keep what `packed` made of a window's scores, if the disk takes it."""
        self._kept.store(self._key(window), data)

    def forget(self) -> None:
        """Remove all windows that were asked for: the results are written."""
        for key in self._keys:
            self._kept.remove(key)

    def _key(self, window: Sequence[int]) -> str:
        text = hashlib.sha256(np.asarray(window, dtype="<i8").tobytes()).hexdigest()
        key = key_of({**self._facts, "window": text})
        self._keys.add(key)
        return key
