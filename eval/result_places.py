"""Where results lie: the files of a folder, of a bundle, or one file. Brings no torch.

for path in result_files(Path("results")): ...
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.bundle.folder import MANIFEST, RESULTS
from llm_coreml.errors import ConfigError

_SUFFIXES = (".json", ".jsonl")


def result_files(place: Path) -> list[Path]:
    """Return the files in `place` that may hold results, by name.

    Args:
        place: A folder of results, whose files and those of the bundles in it are meant; a bundle;
            or a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if place.is_file():
            return [place]
        if (place / MANIFEST).exists():
            # The only file of a bundle that is one of ours.
            return [path for path in (place / RESULTS,) if path.is_file()]
        found = []
        for path in sorted(place.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file():
                found.append(path)
            elif (path / RESULTS).is_file():
                found.append(path / RESULTS)
        return found
    except OSError as error:
        raise ConfigError(
            f"'{place}' cannot be read: {error.strerror}. Give a file or folder of results."
        ) from None


def no_results(place: Path) -> ConfigError:
    """Return what to say of a place that holds none."""
    return ConfigError(
        f"'{place}' holds no results; make some with llm-coreml eval BUNDLE --results '{place}'."
    )
