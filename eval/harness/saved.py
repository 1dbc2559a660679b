"""lm-eval's results as its own files, `MODEL/results_DATE.json`: whole, or a failure that is told.

save(Path("results"), results, samples={})
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_coreml.errors import OutputError
from llm_coreml.output import check_name, check_writable, file_beside, output_error


def check_place(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before any work is done.

    Raises:
        OutputError: as said.
    """
    check_name(folder)
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        inside = there.is_dir()
    except OSError as error:
        raise output_error(folder, error) from None
    if not inside:
        raise OutputError(f"'{there}' is no folder, and results belong into one; give another -o.")
    check_writable(there, "the results")


def save(
    folder: Path, results: Mapping[str, Any], samples: Mapping[str, Iterable[Mapping[str, Any]]]
) -> Path:
    """Write results, and samples by task, as lm-eval does.

    Args:
        folder: Where; the model's own folder is made in it.
        results: What `run_tasks` returns.
        samples: What was asked and answered, by task.

    Returns:
        The file of the results.

    Raises:
        OutputError: something cannot be written.
    """
    place = folder / str(results["model_name_sanitized"])
    date = datetime.now().isoformat().replace(":", "-")
    path = place / f"results_{date}.json"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for task, asked in samples.items():
            lines = "".join(f"{_json(each, None)}\n" for each in asked)
            _write(place / f"samples_{task}_{date}.jsonl", lines)
        _write(path, _json(results, 2))
    except OSError as error:
        raise output_error(path, error) from None
    return path


def to_plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results as plain JSON values, as their file holds them."""
    plain: dict[str, Any] = json.loads(_json(results, None))
    return plain


def _write(path: Path, text: str) -> None:
    with file_beside(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _json(value: Mapping[str, Any], indent: int | None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
