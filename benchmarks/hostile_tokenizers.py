"""Mutated tokenizers and chat templates: how each ends, counted.

    python benchmarks/hostile_tokenizers.py --count 300 --seed 1

Each case takes the bundled model's tokenizer files, with a chat template, and changes something:
bytes, a value anywhere in the JSON, a part that another file has. Then the files go the way of an
export and of a chat, without the model: copied, tried, compared with transformers', encoded,
rendered. A case may end in a bundle with or without text, or in an error of this package; whatever
else it raises, and what takes longer than 30 s, is shown and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.model import open_model
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import find_template

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE = """{% for m in messages %}{{ '<|begin_of_text|>' + m['role'] + ': ' + m['content'] }}\
{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
SLOW = 30.0
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**63, 10**30, 1e308, "", "\x00", "\u202e", "\ud800",
    "a" * 100_000, [], {}, [[]], ["a"], {"a": 1}, "<|end_of_text|>", "(a*)*b", "(?i:[",
)  # fmt: skip
PARTS: tuple[dict[str, Any], ...] = (
    {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0.0]]}},
    {"model": {"type": "WordPiece", "vocab": {"?": 0}, "unk_token": "?"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?:(a|a)*)*$"}}},
    {"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 0}},
    {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": []}},
)
SNIPPETS = (
    "{{ range(10 ** 9) | list }}", "{{ 'a' * 10 ** 10 }}", "{% for i in range(99999) %}",
    "{{ messages[7].x.y }}", "{{ raise_exception('\x1b[31m no') }}", "{% include 'a' %}",
    "{{ ''.__class__.__base__.__subclasses__() }}", "{% endfor %}", "{{ strftime_now('%') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ {} | tojson(indent=10 ** 9) }}", "{#",
    "{{ '%099999999d' | format(1) }}", "{{ lipsum(n=10 ** 6) }}", "{{ namespace(__class__=1) }}",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in JSON, of long lists and mappings the first few."""
    found = [path] if path else []
    keys = range(len(value)) if isinstance(value, list) else value
    if isinstance(value, (dict, list)):
        for key in list(keys)[:20]:
            found += places(value[key], (*path, key))
    return found


def change_json(path: Path, chance: random.Random) -> None:
    """Put something odd in the place of a value, or take it away."""
    content = json.loads(path.read_text())
    if path.name == FILES[0] and chance.random() < 0.3:
        content.update(chance.choice(PARTS))
    else:
        *outer, last = chance.choice(places(content))
        holder = content
        for key in outer:
            holder = holder[key]
        if chance.random() < 0.2:
            del holder[last]
        else:
            holder[last] = chance.choice(ODD)
    path.write_text(json.dumps(content))


def change_bytes(path: Path, chance: random.Random) -> None:
    """Flip, cut out or repeat a few bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3, 30))):
        at = chance.randrange(len(content))
        length = chance.choice((1, 1, 8, len(content) // 2))
        patch = chance.choice((bytes([chance.randrange(256)]), b"", content[at : at + length] * 2))
        content[at : at + length] = patch
        content = content or bytearray(b"{")
    path.write_bytes(bytes(content))


def change_template(path: Path, chance: random.Random) -> None:
    """Put a piece of Jinja somewhere."""
    text = path.read_text()
    at = chance.choice([0, len(text), text.index("{{ eos"), chance.randrange(len(text))])
    path.write_text(text[:at] + chance.choice(SNIPPETS) + text[at:])


def changed(folder: Path, chance: random.Random) -> str:
    """Change one file, and say how."""
    kinds: tuple[tuple[str, str, Callable[[Path, random.Random], None]], ...] = (
        ("tokenizer, JSON", FILES[0], change_json),
        ("tokenizer, bytes", FILES[0], change_bytes),
        ("settings, JSON", FILES[1], change_json),
        ("settings, bytes", FILES[1], change_bytes),
        ("template, Jinja", FILES[2], change_template),
        ("template, bytes", FILES[2], change_bytes),
    )
    label, name, change = chance.choice(kinds)
    change(folder / name, chance)
    return label


def end_of(folder: Path, draft: Path) -> str:
    """Take the files the way of an export and a chat, and say how it ended."""
    notes: list[str] = []
    write_tokenizer(open_model(folder), draft, notes.append)
    if not (draft / FILES[0]).is_file():
        return "without text"
    tokenizer = Tokenizer(draft / FILES[0])
    template = find_template(draft)
    if template is not None:
        try:
            prompt = template.render([{"role": "user", "content": "Hello"}])
        except LlmCoreMLError:
            return "without chats"
        tokenizer.decode(tokenizer.encode(prompt))
    return "told of" if notes else "used"


def main() -> None:
    """Print how many cases ended how, and every unexpected end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad = []
    for number in range(arguments.count):
        with tempfile.TemporaryDirectory() as place:
            folder, draft = Path(place) / "model", Path(place) / "draft"
            shutil.copytree(bundled_model(), folder)
            draft.mkdir()
            (folder / FILES[2]).write_text(TEMPLATE)
            kind = changed(folder, random.Random(f"{arguments.seed} {number}"))
            begun = time.monotonic()
            try:
                end = end_of(folder, draft)
            except LlmCoreMLError as error:
                end = f"refused ({type(error).__name__})"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                end = "UNEXPECTED"
                bad.append(f"{number}: {kind}: {type(error).__name__}: {error}"[:300])
            if time.monotonic() - begun > SLOW:
                bad.append(f"{number}: {kind}: {time.monotonic() - begun:.0f} s")
            ends[kind][end] += 1
    print("| changed | ends |\n|---|---|")
    for kind, counts in sorted(ends.items()):
        print(f"| {kind} | {', '.join(f'{n} {end}' for end, n in counts.most_common())} |")
    print(f"\n{arguments.count} cases, {len(bad)} unexpected or slower than {SLOW:g} s")
    print("\n".join(bad))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
