"""Every flag of every verb with absurd values: does each end in a sentence?

    python benchmarks/hostile_flags.py
    python benchmarks/hostile_flags.py --verbs generate,eval --show
    python benchmarks/hostile_flags.py --part 2/8          # every eighth, from the second on

A tiny model is exported, and each call runs in a process of its own, forked from one that has
loaded everything. Wrong is: a traceback, an unexpected error, a crash, text that no terminal should
get, more than the time allowed, and files that stay. A call that is accepted runs to its end.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

# A forked process has none of the threads that its parent's OpenMP waits for.
os.environ["OMP_NUM_THREADS"] = "1"
SECONDS = 30
MEMORY = 8 << 30  # of address space, of which torch maps most without using it
HUGE = "1" + 30 * "0"
NUMBERS = (
    *("0", "-1", "1", "2", HUGE, "-" + HUGE, "9223372036854775808", "4294967297", "1" + 5000 * "0"),
    *("nan", "inf", "-inf", "1e999", "1e-999", "1.5", "", " ", "x", "0x10", "1_0", "\u0967", "--"),
)
TEXTS = (
    *("", " ", "x", "-", "..", "/dev/null", "~nouser/x", "none", "nan", HUGE, 5000 * "x"),
    *(
        "\x1b]0;title\x07",
        "a\nb",
        "a\0b",
        "\u202eabc",
        "\udcff",
        "\U0001f600",
        "codebook:99999999999999999",
    ),
    *("codebook:0", "codebook:\u0967", "int4-group:4", "1,1", "1," + HUGE, "1,,8", "1,-8", "8MB"),
    *("9" * 15 + "TB", "1e5GB", "nanGB", "cuda", "cuda:99", "hpu", "meta", "cuda:" + 30 * "9"),
)
IDS = ("[1, null]", "[9223372036854775808]", f"[{HUGE}]", "[-1]", "[97]", "[1.5]", '["1"]', "[[1]]")
IDS_FILES = (*IDS, "[true]", "[]", "{}", "null", "1", "[NaN]", "", "\x00", "1 2 3", 2000 * "[")
# Words that a call goes without where a flag contradicts them, which would be all that is told.
WITHOUT = {
    "--cache": ("--no-cache",),
    **dict.fromkeys(("--size", "--plan", "--scheme", "--embedding"), ("--bits", "16")),
    "--model": ("--artifact-only",),
}


@dataclass(frozen=True)
class Call:
    """One call of the command line.

    Attributes:
        words: What follows the program's name.
        about: Verb and flag, and the beginning of the value.
    """

    words: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Ending:
    """How a call ended.

    Attributes:
        kind: `done`, `refused`, or what is wrong.
        told: The end of stderr.
    """

    kind: str
    told: str


def base_words(verb: str, model: Path, bundle: Path) -> tuple[str, ...]:
    """Return the words of a call that works, or would with one flag more."""
    shapes = ("--context", "32", "--seq-lengths", "1,8", "--bits", "16", "--no-cache")
    return {
        "export": ("export", str(model), "-o", "out", *shapes),
        "eval": ("eval", str(bundle), "--artifact-only", "--tokens", "8"),
        "generate": ("generate", str(bundle), "-p", "The", "--max-new-tokens", "2"),
        "show": ("show", str(bundle)),
        "ls": ("ls",),
        "diff": ("diff", str(bundle), str(bundle), "--tokens", "8"),
        "inspect": ("inspect", str(bundle), "--numerics", "--tokens", "8"),
        "run": ("run", str(bundle)),
        "extract": ("extract", str(bundle), "-o", "out"),
    }[verb]


def calls(verbs: Sequence[str], model: Path, bundle: Path) -> Iterator[Call]:
    """Yield a call for each flag and value."""
    from llm_coreml.cli.main import cli

    for verb in verbs:
        words = base_words(verb, model, bundle)
        for parameter in cli.commands[verb].params:
            if isinstance(parameter, click.Argument):
                for value in TEXTS:
                    yield Call((verb, value, *words[1 + parameter.nargs :]), f"{verb} {value!r}")
                continue
            if parameter.is_flag or "--help" in parameter.opts:
                continue
            numeric = isinstance(
                parameter.type, (click.types.IntParamType, click.types.FloatParamType)
            )
            flag = max(parameter.opts, key=len)
            kept = tuple(word for word in words if word not in WITHOUT.get(flag, ()))
            for value in NUMBERS if numeric else (*TEXTS, *NUMBERS):
                yield Call((*kept, flag, value), f"{verb} {flag} {value[:40]!r}")


def file_calls(verbs: Sequence[str], bundle: Path, folder: Path) -> Iterator[Call]:
    """Yield calls that are given files of tokens and of tensors with absurd contents."""
    for number, text in enumerate(IDS_FILES):
        path = folder / f"ids{number}.json"
        path.write_text(text)
        for verb in {"diff", "inspect"} & set(verbs):
            words = (*base_words(verb, bundle, bundle), "--ids", str(path))
            yield Call(words, f"{verb} --ids of {text[:30]!r}")
    arrays = {
        "huge": np.array([[2**63]], np.uint64),
        "negative": np.array([[-1]]),
        "beyond": np.array([[10**6]]),
        "float": np.array([[np.nan]]),
        "object": np.array([[None]], object),
        "text": np.array([["x"]]),
        "empty": np.zeros((1, 0), np.int64),
        "deep": np.zeros((1,) * 20, np.int64),
    }
    for name, value in arrays.items() if "run" in verbs else ():
        for first in ("tokens", "start_pos"):
            other = {"tokens": np.ones((1, 1), np.int64), "start_pos": np.zeros(1, np.int64)}
            path = folder / f"{first}-{name}.npz"
            np.savez(path, allow_pickle=True, **{**other, first: value})
            words = (*base_words("run", bundle, bundle), "--inputs", str(path))
            yield Call(words, f"run --inputs, {first} {name}")


def ended(call: Call, scratch: Path) -> Ending:
    """Run a call in a forked process, and judge it."""
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("work", "temporary", "home"):
        (scratch / name).mkdir(parents=True)
    process = os.fork()
    if process == 0:
        _run(call, scratch)
    begun = time.monotonic()
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if time.monotonic() - begun > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Ending("hangs", "")
        time.sleep(0.01)
    return _judge(scratch)


def _run(call: Call, scratch: Path) -> None:
    """Become the command line; its exit code goes into a file."""
    from llm_coreml.cli.main import main

    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(scratch / "work")
        os.environ.update(TMPDIR=str(scratch / "temporary"), HOME=str(scratch / "home"))
        tempfile.tempdir = None
        for name, number in (("out", 1), ("err", 2)):
            descriptor = os.open(scratch / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, number)
        sys.argv = ["llm-coreml", *call.words]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (scratch / "code").write_text(str(code))
        os._exit(0)


def _judge(scratch: Path) -> Ending:
    err = (scratch / "err").read_bytes().decode("utf-8", "backslashreplace")
    code = int((scratch / "code").read_text()) if (scratch / "code").exists() else None
    told = err.strip().splitlines()[-1:] or [""]
    left = [path.name for path in (scratch / "temporary").iterdir()]
    if code is None:
        return Ending("crashes", told[0])
    if "Traceback" in err or "an unexpected" in err or code == 70:
        return Ending("unexpected", told[0])
    if not all(letter.isprintable() or letter in "\n\t" for letter in err):
        return Ending("unprintable", told[0])
    if len(told[0]) > 3000:
        return Ending("endless", told[0][:200])
    if left:
        return Ending("leaves files", f"{left} {told[0]}")
    if code and any((scratch / "work").iterdir()):
        return Ending("leaves output", told[0])
    return Ending("refused" if code else "done", told[0])


def make_bundle(root: Path, backend: str = "coreml") -> tuple[Path, Path]:
    """Write a tiny model with a tokenizer, and export it; returns both folders."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_coreml.pipeline import ExportConfig, export

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(root / "model")
    words = {chr(33 + at): at for at in range(94)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "model/tokenizer.json"))
    config = ExportConfig(bits=16, context=32, seq_lengths=(1, 8), backend=backend)
    export(root / "model", output=root / "bundle", config=config, cache=False)
    return root / "model", root / "bundle"


def main() -> None:
    """Run all calls, and print what is wrong and how many ended in which way."""
    from llm_coreml.cli.main import cli

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--verbs", default=",".join(cli.commands))
    parser.add_argument("--flags", default="", help="only these, such as --tokens,--device")
    parser.add_argument("--part", default="1/1", help="such as 2/8")
    parser.add_argument("--show", action="store_true", help="how every call ended")
    options = parser.parse_args()
    verbs = options.verbs.split(",")
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        root = Path(folder)
        model, bundle = make_bundle(root)
        (root / "files").mkdir()
        part, parts = map(int, options.part.split("/"))
        every = [*calls(verbs, model, bundle), *file_calls(verbs, bundle, root / "files")]
        for call in every[part - 1 :: parts]:
            if options.flags and not set(options.flags.split(",")) & set(call.words[-2:-1]):
                continue
            ending = ended(call, root / "scratch")
            counts[ending.kind] += 1
            if options.show or ending.kind not in ("done", "refused"):
                print(f"{ending.kind}: {call.about}: {ending.told[:300]!r}", flush=True)
    print(json.dumps({"calls": sum(counts.values()), **counts}))


if __name__ == "__main__":
    main()
