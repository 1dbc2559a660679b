"""Chat templates: rendered to the letter as transformers renders them, and hostile ones told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exported import make_tokenizer
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.tokenizer import apart, chat_template
from llm_coreml.tokenizer.chat_template import ChatTemplate, find_template, named_tokens

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}
"""
INST = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != \
(loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/...') }}\
{% endif %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}\
{{ ' ' + message['content'] + eos_token }}{% endif %}\
{% endfor %}"""
HEADERS = """{%- set ns = namespace(system='', seen=false) -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set ns.system = message.content -%}
{%- endfor -%}
{{- bos_token + 'Today: ' + strftime_now('%Y') + '\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {% generation %}<|header|>{{ message.content }}<|eot|>{% endgeneration %}
    {%- else -%}
        <|header|>{{ message | tojson }}<|eot|>
    {%- endif -%}
{%- endfor -%}
{% macro last(many) %}{{ many[-1].role }} of {{ many | length }}{% endmacro %}
{{ last(messages[::-1]) }} {{ {'b': [1, none], 'a': 'é<'} | tojson(indent=2) }}
{{ tools is none }} {{ tools is defined }} {{ unknown is defined }} {{ range(3) | list }}
{%- if not add_generation_prompt %} end{% endif %}
"""
MESSAGES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello <|im_end|> {{ 1 + 1 }}"}],
    [
        {"role": "user", "content": "  two\nlines  "},
        {"role": "assistant", "content": "Größe 😀"},
        {"role": "user", "content": ""},
    ],
    [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "'\"&<>"}],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"})


def test_a_template_may_name_all_tokens_that_transformers_names(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    further = {"boi_token": "<s>", "extra_special_tokens": {"eoi_token": "</s>"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **further}))
    text = "{{ bos_token }}{{ messages[0].content }}{{ boi_token }}{{ eoi_token }}"
    (folder / "chat_template.jinja").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = find_template(folder)
    assert found is not None and dict(found.tokens) == tokenizer.special_tokens_map
    theirs = tokenizer.apply_chat_template(MESSAGES[0], tokenize=False)
    assert found.render(MESSAGES[0], answer=False) == theirs and "<s></s>" in theirs


@pytest.mark.parametrize("text", [CHATML, INST, HEADERS], ids=["chatml", "inst", "headers"])
def test_text_is_that_of_transformers(text: str, folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    tokenizer.save_pretrained(folder)
    found = find_template(folder)
    assert found is not None
    compared = 0
    for messages in MESSAGES:
        for answer in (False, True):
            try:
                expected = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answer
                )
            except Exception as error:
                with pytest.raises(ConfigError, match="refuses these messages") as caught:
                    found.render(messages, answer)
                assert str(error) in str(caught.value)
            else:
                assert found.render(messages, answer) == expected
                compared += 1
    assert compared >= 4


def test_where_a_template_is_found(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def configured(value: Any) -> ChatTemplate | None:
        text = json.dumps({**settings, "chat_template": value})
        (folder / "tokenizer_config.json").write_text(text)
        return find_template(folder)

    assert find_template(folder) is None
    assert configured("in config") == ChatTemplate("in config", named_tokens(folder))
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    found = configured(several)
    assert found is not None and found.text == "d"
    assert configured(several[:1]) is None and configured(7) is None and configured("") is None
    (folder / "chat_template.jinja").write_text("in a file")
    found = configured("in config")
    assert found is not None and found.text == "in a file"
    assert found.tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def test_special_tokens_in_their_older_spelling(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>", "special": True}, "bos_token": "old"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "unk_token": 3})
    )
    assert named_tokens(tmp_path) == {"eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    assert named_tokens(tmp_path)["bos_token"] == "old"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(CHATML, "<|im_end|>"), (INST, "</s>"), ("{{ messages[0].content }}", None), ("none", None)],
)
def test_the_end_of_a_turn(text: str, expected: str | None) -> None:
    assert template(text).end_of_turn(["<s>", "</s>", "<|im", "<|im_end|>"]) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\n{% for %}", "line 2"),
        ("{{ messages.no.such }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError|crashed"),
        ("{{ 'a' * 9000000 }}", "9,000,000 letters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|crashed"),
        ("{% include 'x' %}", "TypeError|no loader"),
        ("{{ strftime_now(7) }}", "TypeError"),
    ],
)
def test_templates_that_break(text: str, told: str) -> None:
    with pytest.raises(ArtifactError, match=f"^The chat template cannot be used: .*({told})"):
        template(text).render(MESSAGES[0])


def test_a_template_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 1.0)
    monkeypatch.setattr(apart, "_PATIENCE", 100)  # its own work counts, not the clock
    nested = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(ArtifactError, match="it is not done after 1 s"):
        template(nested).render(MESSAGES[0])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"role": "user"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": b""}],
    ],
)
def test_what_is_no_message(messages: Any) -> None:
    with pytest.raises(ConfigError, match=r"message"):
        template(CHATML).render(messages)
