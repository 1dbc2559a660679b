"""Chats over one cache: what is read again, what ends an answer, and what is told of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_coreml import LanguageModel, load
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.runtime.runner import Runner
from llm_coreml.runtime.sampling import Sampler

TEMPLATE = """{% for m in messages %}{{ '<s>' + m.role[0] + ': ' + m.content + '</s>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<s>a: ' }}{% endif %}"""
HELLO = {"role": "user", "content": "Hi"}


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "out"))


@pytest.fixture
def model(own_bundle: Path) -> LanguageModel:
    (own_bundle / "chat_template.jinja").write_text(TEMPLATE)
    return load(own_bundle, checked=False)


@pytest.fixture
def read(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the runner is fed before each answer."""
    fed: list[list[int]] = []
    feed = Runner.feed

    def listen(self: Runner, tokens: Sequence[int]) -> object:
        fed.append(list(tokens))
        return feed(self, tokens)

    monkeypatch.setattr(Runner, "feed", listen)
    return fed


def afresh(model: LanguageModel, messages: list[dict[str, str]], count: int) -> str:
    """The answer of a cache that holds nothing."""
    model.reset()
    return model.chat(messages, count)


def test_a_second_turn_reads_what_is_new(model: LanguageModel, read: list[list[int]]) -> None:
    first = model.chat([HELLO], 4)
    messages = [HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "So"}]
    second = model.chat(messages, 4)
    prompts = [model.tokenizer.encode(model.template.render(part)) for part in ([HELLO], messages)]
    assert prompts[0][0] == 0 and prompts[0][1] != 0  # one beginning token
    assert read[0] == prompts[0]
    kept = len(prompts[1]) - len(read[1])
    assert read[1] == prompts[1][kept:] and kept >= len(prompts[0])
    assert second == afresh(model, messages, 4)
    assert read[2] == prompts[1]


def test_another_conversation_keeps_what_is_common(
    model: LanguageModel, read: list[list[int]]
) -> None:
    model.chat([HELLO], 4)
    other = [{"role": "user", "content": "Ha"}]
    answer = model.chat(other, 4)
    assert 0 < len(read[1]) < len(read[0])
    assert answer == afresh(model, other, 4)
    assert model.chat(other, 4) == answer  # the last token is read again for its logits
    assert len(read[3]) == 1


def test_other_uses_of_the_model_between_turns(model: LanguageModel) -> None:
    answer = model.chat([HELLO], 4)
    model.generate("The quick", 3)
    model.logits([5, 6, 7])
    assert model.chat([HELLO], 4) == answer
    model.runner.reset(position=9)
    assert model.chat([HELLO], 4) == answer


def test_why_a_text_ends(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream_chat([HELLO], 5)
    assert stream.finish is None
    text = "".join(stream)
    assert (stream.finish, stream.new_tokens) == ("length", 5)
    assert stream.prompt_tokens == len(model.tokenizer.encode(model.template.render([HELLO])))
    whole = model.stream("The quick", 500)
    list(whole)
    assert whole.finish == "context" and model.runner.position == model.runner.context
    token = list(model.runner.generate(model.tokenizer.encode(model.template.render([HELLO])), 5))
    monkeypatch.setitem(model.__dict__, "_turn_ends", frozenset([token[2]]))
    ended = model.stream_chat([HELLO], 5)
    assert text.startswith("".join(ended)) and ended.finish == "stop" and ended.new_tokens == 2


def test_the_ends_of_turns(own_bundle: Path) -> None:
    (own_bundle / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "<s>"))
    model = load(own_bundle, checked=False)
    assert model._turn_ends == {0, 1}  # the template's, and the program's


def test_a_special_token_stops_a_text_that_never_shows_it(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.tokenizer.encode("x")[0]
    for choice, stop, made in ((0, "<s>", 0), (0, ("no", "<s>"), 0), (0, "x", 3), (first, "x", 1)):
        monkeypatch.setattr(Sampler, "choose", lambda self, row, choice=choice: choice)
        for stream in (model.stream("The", 3, stop=stop), model.stream_chat([HELLO], 3, stop=stop)):
            assert "".join(stream) == "" and stream.new_tokens == made
            assert stream.finish == ("length" if made == 3 else "stop")


def test_a_stop_text_is_never_shown(model: LanguageModel) -> None:
    whole = model.generate("The quick", 30)
    for begin in range(0, len(whole) - 4, 5):
        stop = whole[begin + 1 : begin + 4]
        stream = model.stream("The quick", 30, stop=["never said", stop])
        shown = list(stream)
        assert "".join(shown) == whole[: whole.index(stop)] and stream.finish == "stop"
        assert "" not in shown
    stream = model.stream("The quick", 30, stop=[f"{whole[-2:]} more"])
    assert "".join(stream) == whole and stream.finish == "length"
    with pytest.raises(ConfigError, match="A stop text is empty"):
        model.generate("The", stop=[""])
    # A text is no list of its letters.
    assert model.generate("The quick", 30, stop=whole[5:9]) == whole[: whole.index(whole[5:9])]
    assert model.generate("The quick", 30, stop=f"{whole[2:4]}\0") == whole


def test_a_bundle_without_a_template(own_bundle: Path) -> None:
    with pytest.raises(ArtifactError, match="no chat template"):
        load(own_bundle).chat([HELLO])


def test_a_conversation_longer_than_the_context(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"conversation is \d+ tokens long.*context holds 64"):
        model.chat([{"role": "user", "content": "word " * 100}])
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        model.chat([HELLO], 0)


def test_a_rewound_sequence_is_that_long(model: LanguageModel) -> None:
    model.runner.reset()
    model.runner.feed([5, 6, 7, 8])
    model.runner.rewind(2)
    row = model.runner.feed([7])
    assert row.equal(model.logits([5, 6, 7])[-1])
    with pytest.raises(ConfigError, match="3 tokens long"):
        model.runner.rewind(4)
