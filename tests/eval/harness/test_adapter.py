"""lm-eval's interface over our runners: its own cases for a model, and its own model beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_coreml
from artifacts import UNQUANTIZED
from exported import TEXT
from fake_runner import FakeRunner
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.harness.adapter import ExportedModel, SubjectModel
from llm_coreml.eval.harness.subject import NamedTokens, Subject, open_subject
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import ChatTemplate
from shared import Shared

CONTEXT = 64
EXACT = ExportConfig(context=CONTEXT, seq_lengths=(1, 8), compute_precision="fp32", **UNQUANTIZED)
CHOICES = [
    ("Question: What does len give?\nAnswer:", " the length"),
    ("Question: What does len give?\nAnswer:", " a list of names"),
    ("Question: What does len give?\nAnswer:", " nothing"),
    ("Question: What does len give?\nAnswer: ", " its arguments"),
    ("The with statement is used to", " wrap the execution of a block"),
    ("The with statement", " is used to wrap"),
    ("", "def add(a, b):"),
    (TEXT, " and by whom"),
]
PAGES = ["A", "The reader's time is worth more.", TEXT, 3 * TEXT]
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("The with statement is used to", {"until": ["\n"], "max_gen_toks": 20}),
    ("The with statement is used to", {"until": [" the", "."], "max_gen_toks": 20}),
    ("The with statement is", {"until": "\n\n", "max_gen_toks": 7, "do_sample": False}),
    ("A list is", {"max_gen_toks": 12, "temperature": 0.0}),
    (TEXT, {"until": ["zzz"], "max_gen_toks": 16}),
]


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, at) for at, each in enumerate(arguments)]


def original(folder: Path) -> HFLM:
    """lm-eval's own model of a checkpoint."""
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=CONTEXT,
        device="cpu",
    )


@pytest.fixture(scope="module")
def demo() -> SubjectModel:
    """The bundled model in eager PyTorch: trained, so that its texts are no noise."""
    folder = bundled_model()
    runner = EagerRunner(build_original(open_model(folder), CONTEXT), "eager")
    names = NamedTokens("<|begin_of_text|>", 0, "<|end_of_text|>", 1)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    return SubjectModel(Subject("demo", runner, tokenizer, names, stop=(1,)))


@pytest.fixture(scope="module")
def demo_original() -> HFLM:
    return original(bundled_model())


@pytest.fixture(scope="module")
def exported(shared: Shared, checkpoint: Path) -> Path:
    """The tiny model as a program in fp32 that gives last rows alone."""

    def export(folder: Path) -> None:
        llm_coreml.export(checkpoint, output=folder / "bundle", config=EXACT)

    return shared.folder("exact", [checkpoint, EXACT], export) / "bundle"


@pytest.fixture(scope="module")
def program(exported: Path) -> ExportedModel:
    """The program without its one rounding: what Core ML remembers is fp16."""
    made = get_model("llm-coreml").create_from_arg_string(
        f"pretrained={exported},mode=fp32", {"batch_size": 1, "device": "cpu"}
    )
    assert isinstance(made, ExportedModel)
    return made


def check_equal(ours: SubjectModel, theirs: HFLM) -> None:
    """Hold all three kinds of answers against lm-eval's own model."""
    found = ours.loglikelihood(asked("loglikelihood", *CHOICES))
    expected = theirs.loglikelihood(asked("loglikelihood", *CHOICES), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-3)
    assert [each[1] for each in found] == [each[1] for each in expected]
    pages = asked("loglikelihood_rolling", *((page,) for page in PAGES))
    rolled = theirs.loglikelihood_rolling(pages, disable_tqdm=True)
    assert ours.loglikelihood_rolling(pages) == pytest.approx(rolled, abs=1e-3)
    prompts = asked("generate_until", *PROMPTS)
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_a_trained_model_answers_as_lm_evals_own(demo: SubjectModel, demo_original: HFLM) -> None:
    check_equal(demo, demo_original)
    texts = demo.generate_until(asked("generate_until", *PROMPTS))
    # Each ends at its first stop, which is left out.
    assert texts[0] and "\n" not in texts[0]
    assert texts[1].startswith(texts[0] + "\n") and " the" not in texts[1]


def test_the_program_of_a_bundle_answers_as_lm_evals_own_on_the_original(
    program: ExportedModel, checkpoint: Path
) -> None:
    check_equal(program, original(checkpoint))


def test_a_request_is_answered_alike_whatever_was_read_before(program: ExportedModel) -> None:
    alone = [program.loglikelihood(asked("loglikelihood", each))[0][0] for each in CHOICES]
    together = program.loglikelihood(asked("loglikelihood", *reversed(CHOICES)))
    assert [each[0] for each in reversed(together)] == pytest.approx(alone, abs=1e-5)


def test_a_model_knows_its_tokens_and_sizes(program: ExportedModel, exported: Path) -> None:
    assert program.max_length == CONTEXT and program.prefix_token_id == 0
    assert program.eot_token_id == 1 and program.max_gen_toks == 256
    assert program.tokenizer.bos_token == "<s>" and program.tokenizer.eos_token == "</s>"
    ids = program.tok_encode("hello world")
    assert ids[0] == 0 and program.tok_decode(ids) == "hello world"
    assert program.tok_decode(ids, skip_special_tokens=False) == "<s>hello world"
    assert program.get_model_info()["model_dtype"] == "fp32"
    assert program.tokenizer_name.startswith("bundle-") and "/" not in program.tokenizer_name
    assert program.chat_template(True) is None


# Crafted logits


class Characters:
    """A tokenizer of digits, of which 0 begins a text and 9 ends it."""

    beginning = (0,)
    special = {"<0>": 0, "<9>": 9}

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text.replace("<0>", "0")]

    def prompt(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids if ids[:1] == [0] else [0, *ids]

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        return "".join(str(token) for token in tokens if special or token not in (0, 9))


def crafted(table: torch.Tensor, context: int = 32, every_row: bool = False) -> SubjectModel:
    runner = FakeRunner(table, context=context, every_row=every_row)
    tokenizer: Any = Characters()
    return SubjectModel(
        Subject("digits", runner, tokenizer, NamedTokens("<0>", 0, "<9>", 9), stop=(9,))
    )


def successor() -> torch.Tensor:
    """After token t, t + 1 is the most likely by far."""
    table = torch.full((10, 10), -10.0)
    for token in range(10):
        table[token, (token + 1) % 10] = 10.0
    return table


def noise() -> torch.Tensor:
    return torch.randn(10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("every_row", [True, False])
def test_log_likelihoods_of_crafted_logits(every_row: bool) -> None:
    table = noise()
    model = crafted(table, every_row=every_row)
    logs = torch.log_softmax(table.double(), -1)
    ((found, greedy),) = model._loglikelihood_tokens([(None, [1, 2], [3, 4, 5])])
    assert found == pytest.approx(float(logs[2, 3] + logs[3, 4] + logs[4, 5]), abs=1e-9)
    assert not greedy
    assert crafted(successor())._loglikelihood_tokens([(None, [1, 2], [3, 4])])[0][1] is True
    assert crafted(successor())._loglikelihood_tokens([(None, [1, 2], [3, 5])])[0][1] is False


def test_an_empty_continuation_is_certain() -> None:
    model = crafted(noise())
    assert model._loglikelihood_tokens([(None, [1], [])]) == [(0.0, True)]
    assert model.loglikelihood(asked("loglikelihood", ("", ""), ("12", ""))) == [(0.0, True)] * 2
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", ("",))) != [math.nan]


def test_an_empty_context_is_what_begins_a_text() -> None:
    model = crafted(noise())
    begun = model.loglikelihood(asked("loglikelihood", ("", "12")))
    assert begun == model._loglikelihood_tokens([(None, [0], [1, 2])])
    # A continuation that has it already is not begun twice.
    assert model.loglikelihood(asked("loglikelihood", ("", "<0>12"))) == begun


def test_what_is_too_long_loses_its_beginning() -> None:
    model = crafted(noise(), context=4)
    long, cut = model._loglikelihood_tokens(
        [(None, [7, 8, 1, 2], [3, 4, 5]), (None, [1, 2], [3, 4, 5])]
    )
    assert long == pytest.approx(cut)
    with pytest.raises(ConfigError, match="5 tokens does not fit the 4 positions"):
        model._loglikelihood_tokens([(None, [1], [1, 2, 3, 4, 5])])


def test_logits_that_are_no_numbers_are_named() -> None:
    table = noise()
    table[3] = math.nan
    with pytest.raises(ArtifactError, match="NaN"):
        crafted(table)._loglikelihood_tokens([(None, [1, 2], [3, 4])])


def read_by(model: SubjectModel) -> int:
    runner = model.subject.runner
    assert isinstance(runner, FakeRunner)
    return sum(len(tokens) for tokens, _ in runner.calls)


def test_a_common_beginning_is_read_once() -> None:
    model = crafted(noise())
    shots = [1, 2, 3, 4, 5, 6]
    model._loglikelihood_tokens([(None, shots, [choice]) for choice in (7, 8, 1, 2)])
    assert read_by(model) == len(shots)
    model._loglikelihood_tokens([(None, shots, [choice, 5]) for choice in (7, 8, 1, 2)])
    # The row after the context is read again, and then shared by the choices.
    assert read_by(model) == len(shots) + 1 + 4
    model = crafted(noise())
    model._loglikelihood_tokens([(None, [*shots, 7, 7], [1]), (None, [*shots, 8], [2])])
    assert read_by(model) == len(shots) + 3


def test_prompts_with_a_common_beginning_read_it_once() -> None:
    model = crafted(successor())
    settings = {"until": ["7"], "max_gen_toks": 5}
    prompts = [("1234" + each, settings) for each in ("2", "1", "3")]
    texts = model.generate_until(asked("generate_until", *prompts))
    assert texts == ["3456", "23456", "456"]
    # The beginning and four digits once, three last digits, and what was generated, but for the
    # token that stops a text, and the last of as many as were asked for.
    assert read_by(model) == 5 + 3 + sum(map(len, texts)) - 1


def test_generation_ends_where_it_is_told_to() -> None:
    model = crafted(successor())

    def made(**settings: Any) -> str:
        return model.generate_until(asked("generate_until", ("1", settings)))[0]

    assert made(until=["5"], max_gen_toks=20) == "234"
    assert made(until=["56", "45"], max_gen_toks=20) == "23"
    assert made(until="7", max_new_tokens=3) == "234"
    assert made(max_gen_toks=20) == "2345678"  # 9 ends a text
    assert made(until=[], max_gen_toks=2, temperature=0) == "23"
    sampled = made(max_gen_toks=6, do_sample=True, temperature=5.0, seed=3)
    assert sampled == made(max_gen_toks=6, do_sample=True, temperature=5.0, seed=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_gen_toks": 32}, "no room"),
        ({"max_gen_toks": 0}, "from 1 on"),
        ({"max_gen_toks": 2, "num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 2, "until": [3]}, "until"),
        ({"max_gen_toks": 2, "temperature": -1}, "temperature"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        crafted(noise()).generate_until(asked("generate_until", ("1", settings)))


def test_answers_are_kept_as_they_come() -> None:
    kept: list[tuple[str, Any, Any]] = []

    class Hook:
        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            kept.append((kind, request, answer))

    model = crafted(successor())
    model.set_cache_hook(Hook())
    model.loglikelihood(asked("loglikelihood", ("1", "2")))
    model.loglikelihood_rolling(asked("loglikelihood_rolling", ("12",)))
    model.generate_until(asked("generate_until", ("1", {"max_gen_toks": 1})))
    assert [(kind, request) for kind, request, _ in kept] == [
        ("loglikelihood", ("1", "2")),
        ("loglikelihood_rolling", ("12",)),
        ("generate_until", ("1", {"max_gen_toks": 1})),
    ]


# What begins a text, and how long it may be


@pytest.mark.parametrize("begun", [None, True, False])
def test_a_text_is_begun_once(demo: SubjectModel, demo_original: HFLM, begun: bool | None) -> None:
    ours = SubjectModel(demo.subject, add_bos_token=begun)
    before, demo_original.add_bos_token = demo_original.add_bos_token, begun
    try:
        for text in ("Hello", "<|begin_of_text|>Hello", "<|begin_of_text|>System: be brief", ""):
            for special in (None, True, False):
                theirs = demo_original.tok_encode(text, add_special_tokens=special)
                assert ours.tok_encode(text, add_special_tokens=special) == theirs, (text, special)
    finally:
        demo_original.add_bos_token = before


def test_a_given_token_stands_before_a_text(demo: SubjectModel) -> None:
    assert SubjectModel(demo.subject, prefix_token_id=7).prefix_token_id == 7
    unnamed = SubjectModel(replace(demo.subject, names=NamedTokens()))
    assert unnamed.prefix_token_id == 1  # what ends a text
    with pytest.raises(ArtifactError, match="prefix_token_id"):
        _ = SubjectModel(replace(demo.subject, names=NamedTokens(), stop=())).prefix_token_id


@pytest.mark.parametrize("length", [0, -1, CONTEXT + 1])
def test_a_length_beyond_the_context_is_refused(demo: SubjectModel, length: int) -> None:
    assert SubjectModel(demo.subject, max_length=16).max_length == 16
    with pytest.raises(ConfigError, match="max_length"):
        SubjectModel(demo.subject, max_length=length)


def test_a_batch_is_refused(exported: Path) -> None:
    with pytest.raises(ConfigError, match="one cache"):
        ExportedModel(exported, batch_size=8)


# Chats

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}] {{ m.content | trim }}<|end_of_text|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "What is a list? "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
]


def test_chats_are_rendered_as_lm_evals_own_does(
    demo: SubjectModel, demo_original: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_original.tokenizer, "chat_template", TEMPLATE)
    names = replace(demo.subject.names, chat_template=TEMPLATE)
    chatty = SubjectModel(replace(demo.subject, names=names, template=ChatTemplate(TEMPLATE, {})))
    assert chatty.chat_template(True) == TEMPLATE
    for chat in CHATS:
        assert chatty.apply_chat_template(chat) == demo_original.apply_chat_template(chat)
    begun = [*CHATS[0], {"role": "assistant", "content": "A list is"}]
    assert chatty.apply_chat_template(begun, add_generation_prompt=False) == (
        demo_original.apply_chat_template(begun, add_generation_prompt=False)
    )
    with pytest.raises(ArtifactError, match="no chat template"):
        demo.apply_chat_template(CHATS[0])


def test_a_bundle_without_a_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(exported, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="without a tokenizer"):
        open_subject(copy, checked=False)
