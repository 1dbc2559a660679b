"""Cases of one test, of which some run in `make test-all` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def cases(names: Iterable[str], further: Iterable[str]) -> list[Any]:
    """Return the parameters `names`, with those of `further` marked as exhaustive.

    Raises:
        ValueError: one of `further` is none of `names`.
    """
    names, further = list(names), set(further)
    if unknown := further - set(names):
        raise ValueError(f"{sorted(unknown)} are no cases; there are {names}")
    marks = {True: [pytest.mark.exhaustive], False: []}
    return [pytest.param(name, marks=marks[name in further], id=name) for name in names]
