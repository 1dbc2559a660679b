"""Exports of a tiny model, each ended by a signal at a random moment: how many end clean?

    python benchmarks/interrupted.py --count 60
    python benchmarks/interrupted.py --count 20 --signals KILL --seed 1
    python benchmarks/interrupted.py --count 20 --begin 0.9         # in the last tenth

Clean means: the exit code of the signal with everything as it was, or 0 with the whole new bundle;
nothing half written, no traceback, no temporary file. What `SIGKILL` leaves, the next export
beside it must remove. Every second export replaces an earlier one.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.drafts import remove_dead
from llm_coreml.output import folder_beside

_SHAPES = ("--context", "64", "--seq-lengths", "1,8")
# Python itself starts before we are asked; a signal ends it then as it ends any program.
_BOOT = 0.5


@dataclass(frozen=True)
class Place:
    """Where an export reads and writes; all of it is looked at afterwards."""

    root: Path

    @property
    def output(self) -> Path:
        """The bundle, in a folder of its own."""
        return self.root / "exports" / "out"

    def command(self, *words: str) -> list[str]:
        """Return the words of the export."""
        return [
            *(sys.executable, "-m", "llm_coreml.cli", "export", str(self.root / "model")),
            *("-o", str(self.output), "--cache", str(self.root / "cache"), *_SHAPES, *words),
        ]

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start an export."""
        environment = {**os.environ, "TMPDIR": str(self.root / "temporary")}
        environment["HOME"] = str(self.root / "home")
        return subprocess.Popen(
            self.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            # Who runs this in the background may have been told to ignore Ctrl-C.
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (1, 2)] and None,
        )

    def files(self) -> dict[str, str]:
        """Return a hash of every file that is there, hidden ones too, by name."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if not name.startswith(("model", "cache/")) or ".llm-coreml-" in name:
                data = path.read_bytes() if path.is_file() else b""
                found[name] = hashlib.sha256(data).hexdigest()
        return found

    def sweep(self) -> None:
        """Do what the next export does: begin beside what is there."""
        with folder_beside(self.output.with_name("next"), lambda _: None):
            pass
        shutil.rmtree(self.output.with_name("next"))
        remove_dead(self.root / "temporary", "llm-coreml-process-")
        remove_dead(self.root / "cache")


def make_place(root: Path) -> Place:
    """Write a tiny model, and make the other folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(root / "model")
    for name in ("temporary", "home", "exports", "cache"):
        (root / name).mkdir()
    return Place(root)


def export(place: Place, *words: str) -> dict[str, str]:
    """Export without an interruption, and return what is there afterwards."""
    process = place.start("--overwrite", *words)
    told = process.communicate()[1].decode()
    assert process.returncode == 0, told
    return place.files()


def interrupted(
    place: Place, number: signal.Signals, moment: float, before: dict[str, str], new: dict[str, str]
) -> str:
    """Interrupt an export and return how it ended: `done`, `nothing`, or what is wrong."""
    process = place.start("--overwrite")
    begun = time.monotonic()
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    told = process.communicate(timeout=120)[1].decode(errors="replace")
    code = process.returncode
    if number == signal.SIGKILL:
        place.sweep()
    after = place.files()
    ends = {128 + number}
    if number == signal.SIGKILL or moment < _BOOT:
        ends.add(-number)
    elif any(word in told for word in ("Traceback", "Error", "ignored")):
        return f"printed {told!r}"
    if code == 0 or (number == signal.SIGKILL and after == new):
        return "done" if after == new else f"exit code 0, but {differences(new, after)}"
    if code not in ends:
        return f"exit code {code} after {time.monotonic() - begun:.1f} s: {told!r}"
    return "nothing" if after == before else f"exit code {code}, but {differences(before, after)}"


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return the names of what is not as it should be."""
    wrong = {name for name, _ in expected.items() ^ found.items()}
    return ", ".join(sorted(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--signals", default="INT,TERM,HUP,KILL")
    parser.add_argument("--begin", type=float, default=0.0, help="Share of the export to pass.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    numbers = [signal.Signals[f"SIG{name}"] for name in given.signals.split(",")]
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as root:
        place = make_place(Path(root))
        old = export(place, "--bits", "8")
        earlier = place.root / "earlier"
        place.output.rename(earlier)
        absent = place.files()
        begun = time.monotonic()
        new = export(place)
        longest = time.monotonic() - begun
        for turn in range(given.count):
            number, replaced = numbers[turn % len(numbers)], turn // len(numbers) % 2
            shutil.rmtree(place.output, ignore_errors=True)
            if replaced:
                shutil.copytree(earlier, place.output)
            before = place.files()
            assert before.keys() >= (old if replaced else {}).keys()
            moment = chance.uniform(given.begin, 1.05) * longest
            end = interrupted(place, number, moment, before, {**absent, **new})
            found[number.name][end if end in ("done", "nothing") else "not clean"] += 1
            print(f"{number.name} after {moment:.2f} s: {end}", file=sys.stderr, flush=True)
            if place.files().keys() - (before.keys() | new.keys()):
                shutil.rmtree(place.root / "temporary")
                (place.root / "temporary").mkdir()
    print(f"An export takes {longest:.1f} s; {given.count} were interrupted.\n")
    print("| signal | as before | done | not clean |\n|---|---|---|---|")
    for name, ends in found.items():
        print(f"| {name} | {ends['nothing']} | {ends['done']} | {ends['not clean']} |")


if __name__ == "__main__":
    main()
