"""How many wrong manifests end in one sentence: every field of one, with every kind of wrong value.

Each is opened as `show` and `generate` open it; prints how often each end occurred, and every
end that was no sentence of ours, or took longer than two seconds.

    python benchmarks/hostile_manifests.py out/demo
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SLOW = 2.0


def main() -> None:
    """Try all changes of the manifest of the bundle that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="a small export")
    parser.add_argument("--unchecked", action="store_true", help="open as with that flag")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(given.bundle, Path(scratch) / "bundle"))
        for name, text in _wrong(folder):
            (folder / "manifest.json").write_bytes(text)
            begun = time.monotonic()
            end = _opened(folder, checked=not given.unchecked)
            taken = time.monotonic() - begun
            ends[end.partition(":")[0]] += 1
            if not end.startswith(("opened", "refused")) or taken > _SLOW:
                print(f"{name}: {end} ({taken:.1f} s)")
    print(f"{sum(ends.values())} manifests:", ", ".join(f"{n} {end}" for end, n in ends.items()))


def _wrong(folder: Path) -> Iterator[tuple[str, bytes]]:
    from hostile import WRONG, broken_texts, changed, places, sealed_text

    manifest = json.loads((folder / "manifest.json").read_text())
    yield from broken_texts(manifest).items()
    for place in places(manifest):
        for name, wrong in WRONG.items():
            yield (
                f"{'.'.join(map(str, place))} = {name}",
                sealed_text(changed(manifest, place, wrong)),
            )


def _opened(folder: Path, checked: bool) -> str:
    """Say how showing and generating end."""
    from rich.console import Console

    from llm_coreml.bundle.language_model import load
    from llm_coreml.cli.tables import contents_table
    from llm_coreml.errors import LlmCoreMLError
    from llm_coreml.inspect.contents import contents

    try:
        found = contents(folder, checked)
        Console(file=io.StringIO()).print(contents_table(found))
        json.dumps(found.to_json()).encode()
        load(folder, checked=checked).generate("The", max_new_tokens=1)
    except LlmCoreMLError as error:
        told = str(error)
        short = told.isprintable() and len(told) <= 1200 and "\n" not in told
        return "refused" if short else f"unprintable: {told[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


if __name__ == "__main__":
    main()
