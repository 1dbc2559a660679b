"""A runner reads what a program offers from its description, and holds it against the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch

from llm_coreml.artifact.description import INPUTS, Description, MethodForm
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ArtifactError
from llm_coreml.runtime.program_runner import program_runner
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner
from lowering import specs

VOCAB, CONTEXT = 7, 32


def test_a_bare_file_tells_what_its_manifest_tells(bundle: Path) -> None:
    opened = open_bundle(bundle)
    told = opened.manifest.description
    found = ReferenceRunner(opened.program).description
    assert found.states == told.states
    # A list of one is a number to a file.
    assert found.constant_methods == {**told.constant_methods, "get_eos_ids": 1}
    assert replace(found, constant_methods=told.constant_methods, why=told.why) == told
    assert told.main == told.method_for(8) == "forward" and told.form == "enumerated"


def edited(description: Description, **changes: Any) -> Description:
    """Return the description with another `forward`."""
    return replace(
        description, methods={"forward": replace(description.methods["forward"], **changes)}
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: edited(d, seq_lengths=(1, 4)), r"\(lengths: \(1, 8\), not \(1, 4\)\)"),
        (lambda d: edited(d, functions=("other",)), r"\(functions: .*main.*, not .*other"),
        (lambda d: edited(d, functions=("main", "main")), r"\(functions: "),
        (lambda d: replace(d, every_row=True), r"\(row for each token: False, not True\)"),
        (lambda d: replace(d, context=128), r"\(context: 64, not 128\)"),
        (lambda d: replace(d, states={}), r"\(states: .*cache_keys.*, not {}\)"),
        (
            lambda d: replace(d, states=dict.fromkeys(d.states, "float16 [1]")),
            r"\(states: .*, not .*float16 \[1\]",
        ),
        (
            lambda d: replace(d, methods={"forwards": d.methods["forward"]}),
            "no method 'forwards', only .*forward",
        ),
    ],
)
def test_a_description_of_another_program_is_refused(
    bundle: Path, change: Callable[[Description], Description], part: str
) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(ArtifactError, match=part):
        program_runner(opened.program, change(opened.manifest.description), DECLARED)


def test_a_manifest_that_contradicts_its_program_is_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    program = replace(opened.manifest.program, context=128)
    contradicting = replace(opened, manifest=replace(opened.manifest, program=program))
    with pytest.raises(ArtifactError, match=r"not what the manifest describes.* Export again\."):
        open_runner(contradicting)


@pytest.mark.parametrize("backend", ["coreml", "xnnpack"])
def test_methods_that_remember_apart_are_refused(bundle: Path, backend: str) -> None:
    opened = open_bundle(bundle)
    told = opened.manifest.description
    methods = {
        "prefill": replace(told.methods["forward"], seq_lengths=(8,)),
        "forward": replace(told.methods["forward"], seq_lengths=(1,)),
    }
    apart = replace(told, backend=backend, methods=methods)
    with pytest.raises(ArtifactError, match="prefill, forward have states, which are each method"):
        program_runner(opened.program, apart, DECLARED)


class Table(torch.nn.Module):
    """Logits that depend on the last token, on the position, and on who is asked."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding.from_pretrained(torch.eye(VOCAB) + offset)

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        return self.rows(tokens.to(torch.int32)[:, -1:]) + start_pos.to(torch.int32)


@pytest.fixture(scope="module")
def two_methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of two functions: the method `prefill` reads four tokens and `forward` one."""
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    def partitioner() -> list[Any]:
        skipped = ["aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default"]
        chosen = specs(ct.precision.FLOAT32)
        return [CoreMLPartitioner(compile_specs=chosen, skip_ops_for_coreml_delegation=skipped)]

    methods = {"prefill": (Table(10.0), 4), "forward": (Table(0.0), 1)}
    edge = to_edge_transform_and_lower(
        {
            name: torch.export.export(
                module.eval(), (torch.zeros(1, length, dtype=torch.int64), torch.tensor([0]))
            )
            for name, (module, length) in methods.items()
        },
        partitioner={name: partitioner() for name in methods},
        constant_methods={"get_max_context_len": CONTEXT},
    )
    path = tmp_path_factory.mktemp("methods") / "two.pte"
    path.write_bytes(edge.to_executorch().buffer)
    return path


def test_each_length_is_read_by_its_method(two_methods: Path) -> None:
    output = f"float32 [1, 1, {VOCAB}]"
    description = Description(
        form="multifunction",
        backend="coreml",
        methods={
            "prefill": MethodForm(INPUTS, output, (4,), ("prefill",)),
            "forward": MethodForm(INPUTS, output, (1,), ("forward",)),
        },
        every_row=False,
        states={},
        context=CONTEXT,
        constant_methods={"get_max_context_len": CONTEXT},
    )
    runner = program_runner(two_methods, description, DECLARED)
    assert isinstance(runner, ReferenceRunner) and len(runner.programs) == 2
    assert runner.seq_lengths == (1, 4) and runner.vocab_size == VOCAB
    assert torch.equal(runner.step([0, 1, 2, 3])[0], torch.eye(VOCAB)[3] + 10)
    assert torch.equal(runner.step([5])[0], torch.eye(VOCAB)[5] + 4)
    assert len(list(runner.constants())) > 2
    with pytest.raises(ArtifactError, match="holds 2 Core ML programs; only a single one"):
        _ = runner.program
    assert ReferenceRunner(two_methods).seq_lengths == (1,), "alone, `forward` is what is there"


def test_a_damaged_container_never_reaches_executorch(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    told = replace(opened.manifest.description, backend="xnnpack")
    content, path = opened.program.read_bytes(), tmp_path / "twin.pte"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="it is truncated"):
        program_runner(path, told, DECLARED)
    path.write_bytes(content)
    other = replace(told, constant_methods={**told.constant_methods, "get_vocab_size": 7})
    with pytest.raises(ArtifactError, match="get_vocab_size is 300, not 7"):
        program_runner(path, other, DECLARED)
