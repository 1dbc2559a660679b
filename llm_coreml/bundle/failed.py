"""What is kept of an export whose file failed its verification: `OUT.failed`.

    except VerificationError as error:
        raise keep_failed(draft, Path("out"), error) from None

Hours of work may lie in that file, and whoever looks into the failure needs it. It is no bundle:
there is no manifest, and in its place `verification.json` tells what was found.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llm_coreml.errors import VerificationError
from llm_coreml.output import write_json

FIGURES = "verification.json"


def keep_failed(draft: Path, output: Path, error: VerificationError) -> VerificationError:
    """Keep a draft beside the output that it was to become.

    Args:
        draft: The folder that was written so far; it is moved.
        output: Where the bundle was to be; nothing is written there.
        error: Why it is none.

    Returns:
        The error with the place in its message.

    Raises:
        OSError: it cannot be kept.
    """
    figures = _figures(error.found)
    write_json(draft / FIGURES, {"error": str(error), "found": figures})
    resolved = output.resolve()
    place = _free_place(resolved.with_name(f"{resolved.name}.failed"))
    draft.rename(place)
    kept = f"{error} The file is kept in '{place}', its figures in {FIGURES} there."
    return VerificationError(kept, error.found)


def _free_place(place: Path) -> Path:
    """Return `place`, or one with a number behind it where there is something already."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in itertools.count(2))
    return next(itertools.dropwhile(os.path.lexists, itertools.chain((place,), numbered)))


def _figures(found: object) -> Any:
    """Return a record as JSON values; what is no number, as JSON has none, in words."""
    if is_dataclass(found):
        return {item.name: _figures(getattr(found, item.name)) for item in fields(found)}
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found
