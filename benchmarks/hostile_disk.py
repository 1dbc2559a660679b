"""Odd disks, names, permissions, streams and environments: does each call end in a sentence?

    python benchmarks/hostile_disk.py
    python benchmarks/hostile_disk.py --only stdout --show

A tiny model is exported, and each case calls one verb in a process of its own, forked from one that
has loaded everything; what Python reads when it starts is given to a fresh one. Wrong is: what
`hostile_flags.py` takes for wrong, a refusal by the system in its own words, and a file that was
there before and is another one now. As root, permissions are tried as the user `nobody`, and a full
disk is a small tmpfs; as another user the latter are left out, and said to be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from disk_cases import GROUPS, Case
from hostile_flags import make_bundle

# By the clock, of which a process on a busy machine gets a tenth.
SECONDS = 600
NOBODY = 65534


def content(folder: Path) -> dict[str, str]:
    """Return what tells every file below `folder` from another."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[name] = "folder"
    return found


def ended(case: Case, model: Path, bundle: Path, root: Path) -> tuple[str, str]:
    """Run a case, and return how it ended and the end of what it said."""
    remove(root)
    folder, temporary = root / "work", root / "temporary"
    for path in (folder, temporary, root / "home"):
        path.mkdir(parents=True)
    shutil.copytree(model, folder / "model")
    shutil.copytree(bundle, folder / "bundle")
    try:
        case.prepare(folder)
    except PermissionError:
        return "left out", "this user cannot make it so"
    if case.nobody and os.geteuid():
        return "left out", "this user is not root, who alone can be another"
    words = [
        word.replace("MODEL", str(folder / "model")).replace("BUNDLE", str(folder / "bundle"))
        for word in case.words
    ]
    if case.nobody:
        give_away(root)
    before = content(folder)
    status = run(case, words, root)
    if status is None:
        return "hangs", ""
    after = content(folder)
    encoding = case.environment.get("PYTHONIOENCODING") or "utf-8"
    err = (root / "err").read_bytes().decode(encoding, "backslashreplace")
    told = (err.strip().splitlines() or [""])[-1]
    changed = [name for name in before if after.get(name) != before[name]]
    return judge(case, status, err, told, changed, list(temporary.iterdir()), after), told


def judge(
    case: Case,
    status: int,
    err: str,
    told: str,
    changed: list[str],
    left: list[Path],
    after: dict[str, str],
) -> str:
    """Return what is wrong, or how the call ended."""
    ours = ("out", "out/", "bundle/results.json")
    replaced = status == 0 and "--overwrite" in case.words
    allowed = ours if replaced else ("gone",) if "GONE" in case.environment else ()
    foreign = [name for name in changed if not name.startswith(allowed)]
    if status < 0:
        return f"crashes with {signal.Signals(-status).name}"
    if "Traceback" in err or "an unexpected" in err or "The system refuses" in err:
        return "unforeseen"
    if not all(letter.isprintable() or letter in "\n\t\r" for letter in err):
        return "unprintable"
    if len(told) > 3000:
        return "endless"
    if status not in case.codes:
        return f"code {status}"
    if foreign:
        return f"changes {foreign[:3]}"
    if left or any(".llm-coreml-" in name for name in after):
        return "leaves files"
    # What is said goes to a file as well, which must not grow either in one case.
    if status and not told and 2 not in case.streams and case.largest_file != 0:
        return "says nothing"
    return "refused" if status else "done"


def run(case: Case, words: list[str], root: Path) -> int | None:
    """Return the exit code, negative for a signal, or None for a call that does not end."""
    process = os.fork()
    if process == 0:
        _become(case, words, root)
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.01)


def _become(case: Case, words: list[str], root: Path) -> None:
    """Become the command line in the case's surroundings."""
    os.chdir(root / "work" / ("gone" if "GONE" in case.environment else ""))
    if "GONE" in case.environment:
        os.rmdir(os.getcwd())
    standard = {"TMPDIR": str(root / "temporary"), "HOME": str(root / "home")}
    for name, value in {**standard, **case.environment}.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for number, place in {1: str(root / "out"), 2: str(root / "err"), **case.streams}.items():
        (root / "err").touch()
        if place is None:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        else:
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if case.largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it from its start on
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.largest_file, case.largest_file))
    if case.nobody:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if case.fresh:
        os.execv(sys.executable, [sys.executable, "-m", "llm_coreml.cli", *words])
    tempfile.tempdir = None
    sys.argv = ["llm-coreml", *words]
    _call()


def _call() -> None:
    from llm_coreml.cli.__main__ import run as command

    code = 70
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def give_away(root: Path) -> None:
    """Give the case's folders, with the permissions that they have, to the user `nobody`."""
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def remove(root: Path) -> None:
    """Remove a case's folders, and unmount its disk."""
    if (root / "work/disk").is_mount():
        subprocess.run(["umount", str(root / "work/disk")], check=True)
    shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    """Run all cases, and print what is wrong and how many ended in which way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose names hold one of these")
    parser.add_argument("--part", default="1/1", help="such as 2/4")
    parser.add_argument("--show", action="store_true", help="how every case ended")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    every = [
        case
        for group in GROUPS
        for case in group()
        if any(part in case.name for part in options.only.split(","))
    ]
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        os.chmod(place, 0o755)
        model, bundle = make_bundle(Path(place))
        for case in every[part - 1 :: parts]:
            ending, told = ended(case, model, bundle, Path(place) / "case")
            kind = ending.split(" [")[0]
            counts[kind] += 1
            if options.show or kind not in ("done", "refused", "left out"):
                print(f"{ending}: {case.name}: {told[:300]!r}", flush=True)
        remove(Path(place) / "case")
    print(json.dumps({"cases": sum(counts.values()), **counts}))
    sys.exit(bool(counts.keys() - {"done", "refused", "left out"}))


if __name__ == "__main__":
    main()
