"""Cells that need no model: what a sweep's process does in each of the ways in which it can end.

Its task's model is the word that says how. Without torch a process starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from result_documents import document

ENTRY = ("stub_cells", "run")


def run() -> None:
    """Do what the task on stdin says."""
    task = json.loads(sys.stdin.readline())
    word = Path(task["model"]).name
    if word != "deaf":
        threading.Thread(target=end_with_stdin, daemon=True).start()
    # Who runs it, and how often it is tried, as a test sees it.
    with (Path(task["folder"]) / "tries.jsonl").open("a") as tries:
        tries.write(json.dumps([task["label"], os.getpid(), os.getppid()]) + "\n")
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "exit":
        sys.exit("the last words")
    if word == "refused":
        answer({"sentence": "It is refused.", "exit_code": 5, "peak_memory_bytes": 1})
        time.sleep(600)
    if word in ("hang", "deaf"):
        time.sleep(600)
    if word.startswith("slow"):
        answer({"share": 0.5})
        time.sleep(float(word.removeprefix("slow")))
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = document(task["slug"], model=word, created=created, bits=4)
    answer({"document": found, "peak_memory_bytes": 1})


def answer(value: object) -> None:
    """Write a line; whoever asked ends this process after the last."""
    print(json.dumps(value), flush=True)


def end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(3)
