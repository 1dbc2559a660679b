"""What a task asks of a generation, as lm-eval's dictionary says it, and the text that it gives.

asked = asked_of({"until": [";"], "max_gen_toks": 64}, most=256)
text = complete(subject, tokens, asked)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_coreml.errors import ConfigError
from llm_coreml.eval.harness.subject import Subject
from llm_coreml.runtime.sampling import Sampler, Sampling

# As other libraries call the count; the first that is given counts.
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = frozenset({*_COUNTS, "until", "do_sample", "temperature", "top_p", "seed"})
# Settings of other models that ask for what is done here anyway.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1.0, None),
    "top_k": (0, None, 50),
    "use_cache": (True, None),
}


@dataclass(frozen=True)
class Asked:
    """How to generate.

    Attributes:
        most: Most tokens.
        until: Texts that end it, and are left out.
        sampling: How tokens are chosen.
    """

    most: int
    until: tuple[str, ...]
    sampling: Sampling


def asked_of(settings: Mapping[str, Any], most: int) -> Asked:
    """Read a task's settings.

    Args:
        settings: lm-eval's `generation_kwargs`.
        most: Most tokens, where they do not say.

    Raises:
        ConfigError: a setting is not known, or out of range.
    """
    for name, value in settings.items():
        if name not in _KNOWN and value not in _PLAIN.get(name, ()):
            raise ConfigError(
                f"A task asks to generate with {name}={value!r}, which is not to be had here; "
                f"known are {', '.join(sorted(_KNOWN))}. Change it with --gen-kwargs."
            )
    given = [settings[name] for name in _COUNTS if settings.get(name) is not None]
    count = given[0] if given else most
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"max_gen_toks is {count!r}; it must be a whole number from 1 on.")
    until = settings.get("until") or ()
    texts = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"until is {until!r}; it must be a text or a list of texts.")
    return Asked(count, tuple(text for text in texts if text), _sampling(settings))


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Return how tokens are chosen: as in lm-eval, greedily unless a task says otherwise."""
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False or temperature == 0:
        return Sampling()
    top_p = settings.get("top_p")
    return Sampling(temperature, 1.0 if top_p is None else top_p, settings.get("seed") or 0)


def complete(subject: Subject, tokens: Sequence[int], asked: Asked) -> str:
    """Return the text that continues `tokens`, up to the first of the texts that end it.

    The new tokens are decoded by themselves and special ones left out, as lm-eval does it; what the
    cache holds of the beginning of `tokens` is not read again.

    Args:
        subject: Reads and writes.
        tokens: The prompt.
        asked: How.
    """
    new: list[int] = []
    text = ""
    sampler = Sampler(asked.sampling)
    for token in subject.runner.generate(tokens, asked.most, subject.stop, sampler, reuse=True):
        new.append(token)
        text = subject.tokenizer.decode(new)
        if any(stop in text for stop in asked.until):
            break
    for stop in asked.until:
        text = text.split(stop)[0]
    return text
