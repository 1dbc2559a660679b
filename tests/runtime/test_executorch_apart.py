"""ExecuTorch in a process of its own: the same logits, and whatever ends it is one error here."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.pte import read_delegates
from llm_coreml.bundle import seal
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import Bundle, open_bundle
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError
from llm_coreml.pipeline import export
from llm_coreml.runtime import executorch_apart
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.executorch_apart import Apart
from llm_coreml.runtime.executorch_engine import Here
from tiny import llama

TOKENS = list(range(1, 20))


@pytest.fixture(scope="module")
def told(twin: Path) -> Description:
    return open_bundle(twin).manifest.description


def broken_inside(content: bytes, path: Path) -> bytes:
    """Return a program whose container is in order, and whose first graph is none."""
    data = bytes(read_delegates(path)[0].data)
    at = content.index(data) + 32
    return content[:at] + b"\xff" * (len(data) - 32) + content[at + len(data) - 32 :]


def engine_of(runner: ExecutorchRunner) -> Apart:
    assert isinstance(runner._engine, Apart)
    return runner._engine


def test_it_gives_the_same_logits_and_ends_with_its_runner(twin: Path, told: Description) -> None:
    here = ExecutorchRunner(twin / "model.pte", told)
    apart = ExecutorchRunner(twin / "model.pte", told, apart=True)
    for _ in range(2):  # the second reading begins with an empty cache, too
        assert torch.equal(apart.logits(TOKENS), here.logits(TOKENS))
    assert list(apart.generate(TOKENS, 5)) == list(here.generate(TOKENS, 5))
    process = engine_of(apart)._process
    assert process.poll() is None
    del apart
    assert process.poll() is not None


def test_it_loads_no_exporter() -> None:
    code = (
        "import sys\n"
        "from llm_coreml.runtime.executorch_apart import leave_out_the_exporter\n"
        "leave_out_the_exporter()\n"
        "from executorch.runtime import Runtime\n"
        "assert Runtime.get().backend_registry.is_available('XnnpackBackend')\n"
        "print([name for name in sys.modules if name.startswith(('executorch.exir.', 'sympy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['executorch.exir._warnings']\n", done.stderr


def test_a_crash_is_an_error(twin: Path, told: Description, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(broken_inside((twin / "model.pte").read_bytes(), twin / "model.pte"))
    with pytest.raises(ArtifactError, match=r"damaged inside: .* it crashed with signal \d+\. Exp"):
        ExecutorchRunner(path, told, apart=True)


def test_what_executorch_refuses_and_what_never_ends_are_errors(
    twin: Path, told: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ExecutorchRunner(twin / "model.pte", told, apart=True)
    engine = engine_of(runner)
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    with pytest.raises(ArtifactError, match=r"ExecuTorch cannot run '.*model\.pte': .*inputs"):
        engine.run("forward", tokens, torch.tensor([0]), (1, 1, 300))
    with pytest.raises(ArtifactError, match=r"logits of shape \[1, 1, 300\], not \[1, 1, 299\]"):
        engine.run("forward", tokens[:, :1], torch.tensor([0]), (1, 1, 299))
    assert len(runner.logits(TOKENS)) == len(TOKENS), "an error is no end"
    monkeypatch.setattr(executorch_apart, "_SECONDS", 0.5)
    os.kill(engine._process.pid, signal.SIGSTOP)
    with pytest.raises(ArtifactError, match="it was not done after 1 s"):
        runner.step([1])
    with pytest.raises(ArtifactError, match="damaged inside"):
        runner.step([1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of another's limits")
def test_memory_is_bounded(twin: Path, told: Description) -> None:
    runner = ExecutorchRunner(twin / "model.pte", told, apart=True)
    process = engine_of(runner)._process
    assert resource.prlimit(process.pid, resource.RLIMIT_DATA)[0] < 2 << 30
    assert resource.prlimit(process.pid, resource.RLIMIT_CORE)[0] == 0


def engines(opened: Bundle) -> tuple[type, type]:
    """What runs a bundle, and what runs it unchecked."""
    runners = open_runner(opened), open_runner(replace(opened, checked=False))
    kinds = [type(each._engine) for each in runners if isinstance(each, ExecutorchRunner)]
    return kinds[0], kinds[1]


def test_only_who_has_made_it_runs_it_here(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "_OWN", set())
    assert engines(open_bundle(twin)) == (Apart, Apart), "made by who knows whom"
    model = llama(vocab_size=96, hidden_size=32, intermediate_size=96)
    config = ExportConfig(bits=16, context=32, seq_lengths=(1, 8), backend="xnnpack")
    made = export(model, output=tmp_path / "made", config=config, cache=False)
    assert engines(made) == (Here, Apart)
    assert engines(open_bundle(twin)) == (Apart, Apart)


def test_a_crash_under_checksums_that_were_counted_again(twin: Path, tmp_path: Path) -> None:
    forged = Path(shutil.copytree(twin, tmp_path / "forged"))
    program = forged / "model.pte"
    program.write_bytes(broken_inside(program.read_bytes(), twin / "model.pte"))
    recorded = json.loads((forged / "manifest.json").read_text())
    recorded["program"]["sha256"] = hashlib.sha256(program.read_bytes()).hexdigest()
    recorded["checksum"] = seal.checksum(recorded)
    (forged / "manifest.json").write_text(json.dumps(recorded))
    opened = open_bundle(forged)
    assert opened.checked and not opened.own
    with pytest.raises(ArtifactError, match=r"damaged inside: .* it crashed with signal \d+\."):
        open_runner(opened)
