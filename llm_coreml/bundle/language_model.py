"""A bundle, ready to read and write text.

model = load("out/")
model.generate("The with statement", max_new_tokens=40)
model.logits(model.encode("def"))             # float32 [tokens, vocab]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.sampling import Sampler
from llm_coreml.tokenizer import Tokenizer


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
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Return the text that continues `prompt`.

        Args:
            prompt: Text to continue.
            max_new_tokens: Most tokens to add.
            temperature: 0 takes the most likely token, more draws more freely.
            top_p: Share of probability to draw from.
            seed: Makes draws repeatable.

        Raises:
            ConfigError: the prompt is longer than the context, or an argument is out of range.
        """
        return "".join(
            self.stream(prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        )

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the continuation as it is made; arguments as `generate`."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        sampler = Sampler(temperature, top_p, seed)
        tokens: list[int] = []
        told = ""
        for token in self.runner.generate(self.encode(prompt), max_new_tokens, self._stop, sampler):
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            # A character may take several tokens; until then it decodes to U+FFFD.
            if not text.endswith("\ufffd"):
                yield text[len(told) :]
                told = text


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
