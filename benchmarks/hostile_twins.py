"""Twins with flipped bytes: does every one end in text or in a sentence?

    python benchmarks/hostile_twins.py --count 1000 --called 50

A tiny XNNPACK twin is exported, and each case changes a few bytes of its program, most of them
where no weights are: in its plan, and in what its delegates are given. Every case is shown and fed
in a forked process as a trusted file would be, which says what ExecuTorch itself makes of it;
native crashes are what is expected there. Of those that crashed, hung or took too much, and of some
others, so many as `--called` says are then opened by `llm-coreml generate --unchecked`, where wrong
is whatever `hostile_flags.py` takes for wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hostile_flags import Call, ended, make_bundle

SECONDS = 10
MEMORY = 8 << 30


def changed(content: bytes, places: list[range], chance: random.Random) -> bytes:
    """Return a program of which some bytes are others."""
    result, places = bytearray(content), [*places, range(len(content))]
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.choice(chance.choice(places))
        width = min(chance.choice((1, 1, 1, 4)), len(result) - at)
        odd = (chance.randbytes(width), b"\xff" * width, b"\0" * width, b"\x7f\xff\xff\x7f"[:width])
        result[at : at + width] = chance.choice(odd)
        if chance.random() < 0.5:
            result[at] = content[at] ^ 1 << chance.randrange(8)
    return bytes(result)


def telling_places(path: Path) -> list[range]:
    """Return where a file holds no weights: its plan, and what its delegates are given."""
    from llm_coreml.artifact.pte import read_delegates

    content = path.read_bytes()
    delegates = [bytes(each.data) for each in read_delegates(path)]
    found = [(content.find(data), len(data)) for data in delegates if data]
    plan = min(at for at, _ in found)
    return [range(plan), *(range(at, at + size) for at, size in found)]


def forked(work: Callable[[], str]) -> str:
    """Return what `work` says in a process of its own, or how that process ended."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > SECONDS:
            os.kill(process, 9)
            os.waitpid(process, 0)
            os.close(reader)
            return "hangs"
        time.sleep(0.002)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read().decode()
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return told or "no word"


def here(folder: Path) -> str:
    """Show the bundle, and feed its program in this process; returns `done` or `refused`."""
    from llm_coreml.bundle.folder import open_bundle
    from llm_coreml.errors import LlmCoreMLError
    from llm_coreml.inspect.contents import contents
    from llm_coreml.runtime.executorch import ExecutorchRunner

    try:
        contents(folder, checked=False)
        opened = open_bundle(folder, checked=False)
        runner = ExecutorchRunner(opened.program, opened.manifest.description)
        runner.logits(range(1, 12))
    except LlmCoreMLError:
        return "refused"
    except Exception as error:
        return f"unexpected {type(error).__name__}"
    return "done"


def main() -> None:
    """Try all cases, and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--called", type=int, default=50, help="cases for the command line")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    native: collections.Counter[str] = collections.Counter()
    called: collections.Counter[str] = collections.Counter()
    bad = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        root = Path(place)
        _, bundle = make_bundle(root, backend="xnnpack")
        content = (bundle / "model.pte").read_bytes()
        places = telling_places(bundle / "model.pte")
        folder = shutil.copytree(bundle, root / "changed")
        here_once = forked(lambda: here(folder))
        if here_once != "done":
            raise SystemExit(f"the twin itself does not run: {here_once}")
        calm, violent = [], []
        for number in range(options.count):
            program = changed(content, places, random.Random(f"{options.seed} {number}"))
            (folder / "model.pte").write_bytes(program)
            ending = forked(lambda: here(folder))
            native[ending] += 1
            if ending.startswith("unexpected") or ending == "no word":
                bad.append(f"{number}: {ending}")
            (calm if ending in ("done", "refused") else violent).append(number)
        some = violent[: options.called - options.called // 4]
        for number in [*some, *calm[: options.called - len(some)]]:
            program = changed(content, places, random.Random(f"{options.seed} {number}"))
            (folder / "model.pte").write_bytes(program)
            words = ("generate", str(folder), "--unchecked", "-p", "The", "--max-new-tokens", "9")
            ending = ended(Call(words, str(number)), root / "scratch")
            called[ending.kind] += 1
            if ending.kind not in ("done", "refused"):
                bad.append(f"{number}: called, {ending.kind}: {ending.told[:300]!r}")
    print(json.dumps({"cases": options.count, "in one process": native, "called": called}))
    print("\n".join(bad))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
