"""YAML that a person wrote, read strictly: no aliases, no key twice, no file of any size.

values = read_yaml(Path("recipe.yaml"), "Recipe")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm_coreml.errors import ConfigError

# All settings with their defaults take two kilobytes.
_LARGEST_FILE = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, a few of which, nested, make a tree that fits no memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            at = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise ValueError(f"line {at} holds an alias (*name), which is not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Return a mapping; YAML would keep the last of two values of a key without a word."""
        found = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in found:
                at = key.start_mark.line + 1
                raise ValueError(f"line {at} gives the key '{key.value}' a second time")
            found.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str) -> Any:
    """Return what the file at `path` holds.

    Args:
        path: The file.
        kind: What it is, for messages: `Recipe`.

    Raises:
        ConfigError: it cannot be read, or is no plain YAML.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE >> 20} MiB")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{kind} '{path}' cannot be read: {told}.") from None
