"""Several Core ML programs in one method give the model's logits, and are verified as one is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from artifacts import Artifact, lower, method
from cases import cases
from llm_coreml import export
from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.artifact.method_plan import Delegate
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.config.values import SKIP_HEAD, SKIP_TABLE, SKIPPED
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.eval.pair import read_in_pairs
from llm_coreml.inspect.contents import contents
from llm_coreml.lower import shares
from llm_coreml.lower.forms import form_for
from llm_coreml.lower.shares import cut_of
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.plan.budget import other_bytes
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.program_runner import program_runner
from llm_coreml.runtime.reference import ReferenceRunner
from tiny import BASE, expected_logits, llama, randomize, small_spec, tokens_for

# What fp16 makes of a row's logits, relative to the largest of them.
FP16 = 2e-2
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
}
SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2}
PLAIN: dict[str, Any] = {"scheme": "none", "embedding": "none"}
SPLIT = ("embedding", "head")


@dataclass(frozen=True)
class Case:
    """How a model is cut."""

    config: dict[str, Any]
    holds: tuple[str, ...]
    model: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., Any] = llama


def gemma3(**changes: Any) -> Any:
    """Return a random `Gemma3ForCausalLM` whose layers have windows of 7, but for every second."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = 2 * ["sliding_attention", "full_attention"]
    sizes = {**BASE, "head_dim": 16, "sliding_window": 7, "layer_types": kinds}
    return randomize(Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **changes})))


CASES = {
    "split, enumerated": Case(
        {"split": SPLIT, "seq_lengths": (1, 8)}, ("token table", "layers 0 to 3", "head")
    ),
    "sizes, rings": Case(
        {
            "partition_size": 140_000,
            "seq_lengths": (1, 8),
            "logits": "all",
            "compute_precision": "fp32",
        },
        ("token table, layers 0 to 1", "layers 2 to 3, head"),
        make=gemma3,
    ),
    "inputs of a range, rings": Case(
        {"partition_size": 80_000, "seq_lengths": "1..8", "kv_cache": "inputs"},
        ("token table, layers 0 to 1", "layers 2 to 3, head"),
        make=gemma3,
    ),
    "functions": Case(
        {"split": SPLIT, "functions": "prefill:8,decode:1"},
        ("token table", "layers 0 to 3", "head"),
    ),
    "one length, embedding": Case(
        {"split": ("embedding",), "seq_lengths": (8,)}, ("token table", "layers 0 to 3, head")
    ),
    "one token, head, ane": Case(
        {"split": ("head",), "seq_lengths": (1,), "target": "ane"},
        ("token table, layers 0 to 3", "head"),
    ),
    "ends on kernels, rings": Case(
        {"skip_ops": SKIPPED, "seq_lengths": (1, 8), "partition_size": 80_000},
        ("layers 0 to 1", "layers 2 to 3"),
        make=gemma3,
    ),
    "ends on kernels, functions": Case(
        {"skip_ops": SKIPPED, "functions": "prefill:8,decode:1"}, ()
    ),
    "head on a kernel, range": Case(
        {"skip_ops": (SKIP_HEAD,), "seq_lengths": "1..8", "split": ("embedding",)},
        ("token table", "layers 0 to 3"),
    ),
    "table on a kernel, fp32": Case(
        {
            "skip_ops": (SKIP_TABLE,),
            "seq_lengths": (1, 8),
            "compute_precision": "fp32",
            "logits": "all",
            "kv_cache": "inputs",
        },
        (),
    ),
    "weights as inputs, rings": Case(
        {"constants": "inputs", "seq_lengths": (1, 8), "partition_size": 80_000},
        ("token table, layers 0 to 1", "layers 2 to 3, head"),
        make=gemma3,
    ),
    "weights as inputs, functions": Case(
        {"constants": "inputs", "functions": "prefill:8,decode:1", "compute_precision": "fp32"},
        (),
        {"tie_word_embeddings": True},
    ),
    "weights as inputs, range": Case(
        {"constants": "inputs", "seq_lengths": "1..8", "kv_cache": "inputs", "split": ("head",)},
        ("token table, layers 0 to 3", "head"),
    ),
    "weights as inputs from iOS16": Case(
        {
            "constants": "inputs",
            "seq_lengths": (1, 8),
            "kv_cache": "inputs",
            "minimum_os": "iOS16",
            "skip_ops": (SKIP_TABLE,),
        },
        (),
    ),
    "inputs, fp32": Case(
        {"split": SPLIT, "seq_lengths": (1, 8), "kv_cache": "inputs", "compute_precision": "fp32"},
        ("token table", "layers 0 to 3", "head"),
    ),
    "range": Case(
        {"split": SPLIT, "seq_lengths": "1..8", "logits": "all"},
        ("token table", "layers 0 to 3", "head"),
    ),
    "inputs from iOS16": Case(
        {"split": SPLIT, "seq_lengths": (1, 8), "kv_cache": "inputs", "minimum_os": "iOS16"},
        ("token table", "layers 0 to 3", "head"),
    ),
}
TOKENS = tokens_for(96, 64)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Each case, lowered once."""
    folder = tmp_path_factory.mktemp("partitions")

    def made(name: str) -> Artifact:
        case = CASES[name]
        config = ExportConfig(**{**PLAIN, "context": 64, **case.config})
        return lower(case.make(**{**SIZES, **case.model}), config, folder / f"{name}.pte")

    return functools.cache(made)


@pytest.mark.parametrize("name", cases(CASES, tuple(CASES)[2:]))
def test_the_logits_are_those_of_transformers(
    name: str, artifacts: Callable[[str], Artifact]
) -> None:
    case, artifact = CASES[name], artifacts(name)
    spec, job = artifact.decoder.spec, artifact.job
    cut = cut_of(job, spec, artifact.plan)
    description = form_for(job, spec, 1, (2, 5), cut).description
    assert tuple(each.holds for each in description.partitions) == case.holds
    theirs = expected_logits(case.make(**{**SIZES, **case.model}), TOKENS)
    # It holds the weights as the program does.
    ours = EagerRunner(artifact.decoder, "eager").logits(TOKENS)
    exact = job.precision.name == "fp32"
    for mode, expected, bound in (
        ("fp32", ours, 2e-5),
        ("fp32", theirs, 1e-4 if exact else FP16),
        ("declared", theirs, FP16),
    ):
        runner, at = program_runner(artifact.path, description, Execution(mode=mode)), 0
        # Past the window, padded where 5 and 3 are no lengths, and the last position by itself.
        several = runner.seq_lengths[-1] > 1
        for count in (8, 5, 1, 1, *[8] * 5, 3, 5, 1) if several else 64 * [1]:
            rows = runner.step(TOKENS[at : at + count])
            at += count
            wanted = expected[at - len(rows) : at]
            assert float((rows - wanted).abs().max() / wanted.abs().max()) < bound
        assert at == 64


def test_an_export_verifies_every_partition_and_tells_of_them(tmp_path: Path) -> None:
    model = llama(**SMALL, tie_word_embeddings=True)
    # What is made of the parts goes with them: the Neural Engine's profile, cuts, a head.
    made: dict[str, Any] = {"target": "ane", "profile": "ane-ios18", "layout": "conv"}
    made |= {"linear_split": 32, "head_split": 64, "gather_split": 64, "head": "topk:5"}
    config = ExportConfig(context=64, seq_lengths=(1, 8), split=SPLIT, bits=4, **made)
    notes = Notes()
    bundle = export(model, output=tmp_path / "out", config=config, cache=False, progress=notes)
    told = bundle.manifest.program
    assert told.partitions is not None and told.why is not None
    assert [each.holds for each in told.partitions] == ["token table", "layers 0 to 1", "head"]
    assert told.why.endswith("; in 3 partitions, as --split embedding,head asks for it")
    assert told.methods is not None and told.methods["forward"].functions == 3 * ("main",)
    assert list(told.states) == ["layers_0_cache_keys", "layers_0_cache_values"]
    (note,) = [note for note in notes.told if "partitions" in note]
    assert note.endswith("is the head, too, and lies in both their partitions.")
    verification = bundle.manifest.verification
    assert verification.passed and verification.last_position == 63
    assert verification.conversion is not None and verification.conversion.weights > 20
    runner = open_runner(bundle)
    assert len(list(runner.generate(TOKENS[:11], max_new_tokens=3))) == 3
    assert not any("states" in note for note in notes.told), "each partition has two"
    kinds = [delegate.model for delegate in contents(tmp_path / "out").methods["forward"]]
    assert [list(kind.outputs.items()) for kind in kinds if kind] == [
        [("hidden_out", "fp16 [1, ?, 32]")],
        [("hidden_out", "fp16 [1, 1, 32]")],
        [("topk_0", "fp16 [1, 1, 5]"), ("ids", "int32 [1, 1, 5]")],
    ]
    assert kinds[1] is not None and kinds[1].ops["conv"] > 2 * 7, "cut, and turned"
    spec = open_model(model).spec
    job = resolve(config, spec)
    plan = make_plan(job, spec)
    linear = sum(plan.scheme_of(name).stored_bits(shape) for name, shape in matrices(spec)) // 8
    assert bundle.program.stat().st_size < other_bytes(job, spec, plan) + linear
    at_once = other_bytes(replace(job, split=()), spec, plan)
    table = plan.embedding.stored_bits((spec.vocab_size, spec.hidden_size)) // 8
    assert other_bytes(job, spec, plan) > at_once + table, "the table is foreseen twice"
    sizes = [sum(map(len, weights(delegate))) for delegate in method(bundle.program).delegates]
    for size, each in zip(sizes, told.partitions, strict=True):
        assert 0.7 * each.weight_bytes < size <= each.weight_bytes


class Notes(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def weights(delegate: Delegate) -> list[memoryview]:
    """Return the weight files of a delegate."""
    return [data for path, data in unpack(delegate.data).items() if path.endswith("weight.bin")]


def test_two_exports_part_nowhere_whether_or_not_one_is_cut(
    artifacts: Callable[[str], Artifact], tmp_path: Path
) -> None:
    cut = artifacts("split, enumerated")
    job, spec = cut.job, cut.decoder.spec
    whole_form = form_for(job, spec, 1, (2, 5))
    whole_form.write(cut.decoder, tmp_path / "whole.pte")
    form = form_for(job, spec, 1, (2, 5), cut_of(job, spec, cut.plan))
    execution = Execution(mode="fp32")
    runners = (
        ReferenceRunner(tmp_path / "whole.pte", execution, whole_form.description),
        ReferenceRunner(cut.path, execution, form.description),
    )
    found = read_in_pairs(*runners, [TOKENS[:18]])
    assert all(len(watch.operations) > 100 for watch in found.watches)
    assert found.paired > 0.9 * len(found.watches[0].operations)
    assert max(entry.error for entry in found.parting.operations) < 1e-4
    assert [item.layer for item in found.watches[1].operations][-1] == 4


def test_more_than_two_gigabytes_are_cut_without_being_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = small_spec(num_hidden_layers=6, vocab_size=96)
    job = resolve(ExportConfig(context=64, **PLAIN), spec)
    plan = make_plan(job, spec)
    assert cut_of(job, spec, plan).partitions == ()
    monkeypatch.setattr(shares, "MOST_WEIGHTS", 150_000)
    cut = cut_of(job, spec, plan)
    assert [each.told for each in cut.shares][:2] == ["token table, layers 0 to 1", "layers 2 to 3"]
    assert all(size <= 150_000 for size in cut.sizes)
    assert cut.why.endswith("more than the 2 GB of one delegate")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"partition_size": 1000}, r"head takes [\d,]+ alone; give --partition-size \d+ or"),
        ({"partition_size": 10**6, "backend": "xnnpack"}, "about Core ML's delegates"),
        ({"split": ("head",), "backend": "xnnpack"}, "about Core ML's delegates"),
        ({"partition_size": "much"}, "partition_size is 'much'"),
        ({"partition_size": 0}, "must be at least 1"),
        ({"split": ("heads",)}, "embedding and head. Did you mean 'head'"),
        ({"split": ()}, "names nothing"),
        ({"skip_ops": (SKIP_TABLE,), "embedding": "int4-channel"}, "int8-channel or none"),
        ({"skip_ops": (SKIP_HEAD,), "lm_head": "int8-channel"}, "give --lm-head none"),
        ({"skip_ops": (SKIP_TABLE,), "backend": "xnnpack"}, "has none; drop one of them"),
        ({"skip_ops": (SKIP_TABLE,), "split": ("embedding",)}, "a partition of Core ML's; drop"),
        ({"skip_ops": (SKIP_HEAD,), "split": ("head",)}, "a partition of Core ML's; drop"),
        ({"skip_ops": (SKIP_HEAD,), "head": "topk:4"}, "computes these behind it; drop"),
        ({"skip_ops": (SKIP_HEAD,), "head_split": 32}, "leaves it out of that; drop"),
        ({"skip_ops": (SKIP_TABLE,), "gather_split": 32}, "leaves it out of that; drop"),
        ({"skip_ops": ("aten.linear.default",)}, "stands at the ends of a program"),
        ({"skip_ops": ("aten.embeding.default",)}, "Did you mean 'aten.embedding.default'"),
        ({"skip_ops": ()}, "names nothing"),
        ({"constants": "inputs", "scheme": "int8-channel"}, r"stored as int8 .* Give --bits 16"),
        ({"constants": "inputs", "backend": "xnnpack"}, "has none; drop one of them"),
        ({"constants": "inputs", "layout": "conv"}, "hands them over in each call; drop one"),
    ],
)
def test_what_cannot_be_cut(settings: dict[str, Any], told: str) -> None:
    spec = small_spec()
    with pytest.raises((ConfigError, UnsupportedError), match=told):
        job = resolve(ExportConfig(**{"context": 64, **PLAIN, **settings}), spec)
        cut_of(job, spec, make_plan(job, spec))


def test_layers_that_share_keys_and_values_stay_together() -> None:
    spec = small_spec(num_hidden_layers=4)
    mixers = [
        replace(layer.mixer, shares=1 if at == 3 else None) for at, layer in enumerate(spec.layers)
    ]
    pairs = zip(spec.layers, mixers, strict=True)
    spec = replace(spec, layers=tuple(replace(layer, mixer=mixer) for layer, mixer in pairs))
    job = resolve(ExportConfig(context=64, partition_size=200_000, **PLAIN), spec)
    cut = cut_of(job, spec, make_plan(job, spec))
    assert range(1, 4) in [each.layers for each in cut.shares]
