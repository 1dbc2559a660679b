"""A bundle, ready to read and write text, and to chat.

model = load("out/")
model.generate("The with statement", max_new_tokens=40)
model.generate("The with statement", sampling=Sampling(temperature=0.8, seed=1))
model.chat([{"role": "user", "content": "What is a list?"}])
model.logits(model.encode("def"))             # float32 [tokens, vocab]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.bundle.text_stream import TextStream, stop_texts
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.sampling import GREEDY, Sampler, Sampling
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import ChatTemplate, Message, find_template
from llm_coreml.tokenizer.detokenizer import Detokenizer
from llm_coreml.tokenizer.special_ids import end_tokens


class LanguageModel:
    """The program of a bundle with its tokenizer.

    Attributes:
        manifest: The bundle's manifest.
        runner: Executes the program, see `runtime.runner.Runner`.

    Args:
        folder: Folder that an export wrote.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.

    Raises:
        ArtifactError: the bundle is damaged.
        ConfigError: the execution asks for what is not there.
    """

    def __init__(self, folder: Path, execution: Execution = DECLARED, checked: bool = True) -> None:
        bundle = open_bundle(folder, checked)
        self.manifest = bundle.manifest
        self.runner = open_runner(bundle, execution)
        self._folder = bundle.folder
        self._stop = self.manifest.description.stop_tokens
        self._tokenizer: Tokenizer | None = None
        if bundle.tokenizer.is_file():
            self._tokenizer = Tokenizer(bundle.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ArtifactError if the bundle has none."""
        if self._tokenizer is None:
            raise ArtifactError(
                "This bundle was exported without a tokenizer; export again with one, or feed "
                "tokens to logits()."
            )
        return self._tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises ArtifactError if the bundle has none."""
        template = find_template(self._folder)
        if template is None:
            raise ArtifactError(
                "This bundle has no chat template, as models without tuning for chat have none; "
                "have it continue a text instead, or put a chat_template.jinja beside the model's "
                "tokenizer and export again."
            )
        return template

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        """Tokens that end a text or an answer, by the program and by the tokenizer's files."""
        return frozenset([*self._stop, *end_tokens(self._folder, self.tokenizer).values()])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` as the model reads it, its beginning token included."""
        return self.tokenizer.prompt(text)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of `tokens`, from an empty cache: `[tokens, vocab]`."""
        return self.runner.logits(tokens)

    def reset(self) -> None:
        """Empty the cache."""
        self.runner.reset()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return the text that continues `prompt`.

        Args:
            prompt: Text to continue.
            max_new_tokens: Most tokens to add.
            sampling: How tokens are chosen; the most likely ones without it.
            stop: Texts that end it, or one, beside the model's own end tokens; they are left out.
                One may be a special token's.

        Raises:
            ConfigError: the prompt is longer than the context, or an argument is out of range.
        """
        return "".join(self.stream(prompt, max_new_tokens, sampling=sampling, stop=stop))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> TextStream:
        """Return the continuation, piece by piece as it is made; arguments as `generate`."""
        checked_count("max_new_tokens", max_new_tokens)
        tokens, texts = self.encode(prompt), stop_texts(stop)
        ends = self._ends(self._stop, texts)
        made = self.runner.generate(tokens, max_new_tokens, ends, Sampler(sampling))
        return TextStream(len(tokens), made, Detokenizer(self.tokenizer, after=tokens), texts)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return the assistant's answer to `messages`.

        A conversation goes on by giving it whole, with the answer and the next question at its
        end: what the cache holds of it already is not read again.

        Args:
            messages: The conversation so far, each with a `role` and a `content`.
            max_new_tokens: Most tokens of the answer; None is as many as the context holds.
            sampling: As for `generate`.
            stop: As for `generate`.

        Raises:
            ArtifactError: the bundle has no chat template, or a damaged one.
            ConfigError: the template refuses the messages, the conversation is longer than the
                context, or an argument is out of range.
        """
        return "".join(self.stream_chat(messages, max_new_tokens, sampling=sampling, stop=stop))

    def stream_chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> TextStream:
        """Return the answer, piece by piece as it is made; arguments as `chat`."""
        count = self.runner.context if max_new_tokens is None else max_new_tokens
        checked_count("max_new_tokens", count)
        # A template writes the beginning token itself where its model wants one.
        tokens = self.tokenizer.encode(self.template.render(messages))
        if len(tokens) > self.runner.context:
            raise ConfigError(
                f"The conversation is {len(tokens)} tokens long, and the context holds "
                f"{self.runner.context}; leave out its oldest messages, or export with a larger "
                "--context."
            )
        texts = stop_texts(stop)
        ends = self._ends(self._turn_ends, texts)
        made = self.runner.generate(tokens, count, ends, Sampler(sampling), reuse=True)
        return TextStream(len(tokens), made, Detokenizer(self.tokenizer), texts)

    def _ends(self, tokens: Iterable[int], stop: Sequence[str]) -> tuple[int, ...]:
        """Return `tokens` and those of `stop` that are special tokens, which no text ever shows."""
        special = self.tokenizer.special
        return (*tokens, *(special[text] for text in stop if text in special))


def load(
    folder: str | Path, execution: Execution = DECLARED, checked: bool = True
) -> LanguageModel:
    """Open the bundle at `folder`.

    Args:
        folder: Folder that an export wrote.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.

    Raises:
        ArtifactError: it is damaged, or no bundle.
        ConfigError: the execution asks for what is not there.
    """
    return LanguageModel(Path(folder), execution, checked)
