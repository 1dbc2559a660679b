"""Runners: one way to feed tokens to an artifact or to an eager decoder.

    runner = ReferenceRunner(folder / "model.pte")
    logits = runner.logits([1, 42, 7])           # float32 [3, vocab]
    for token in runner.generate([1, 42, 7], max_new_tokens=20): ...

A prompt is fed as a sum of the program's lengths, largest first (77 = 64 + 8 + 5 x 1): nothing is
padded, so the last row of each chunk is always a real token's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F

from llm_coreml.bundle import Bundle, check_program
from llm_coreml.decoder import Decoder
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.quantize.apply import dense_rows
from llm_coreml.reference.constants import PackedWeight
from llm_coreml.reference.execution import Execution
from llm_coreml.reference.method import load_method
from llm_coreml.sampling import Sampler

# What a device is meant to compute, on any machine.
DECLARED = Execution()


def split_lengths(count: int, lengths: Sequence[int]) -> list[int]:
    """Write `count` as a sum of `lengths`, largest first; `lengths` holds 1."""
    parts: list[int] = []
    for length in sorted(lengths, reverse=True):
        parts += [length] * (count // length)
        count %= length
    return parts


class Runner(ABC):
    """A causal LM with a KV cache, fed in chunks.

    Attributes:
        context: Positions that the cache holds.
        seq_lengths: Chunk lengths that one call accepts.
        vocab_size: Width of the logits.
        every_row: A call returns a row for every token, not only for the last.
        label: What produced the numbers, for tables: `reference runtime`, `eager`...
    """

    context: int
    seq_lengths: tuple[int, ...]
    vocab_size: int
    every_row: bool
    label: str

    def __init__(self) -> None:
        self.position = 0

    @abstractmethod
    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Run one chunk: int64 `[1, S]`, int64 `[1]` -> float `[1, 1 or S, vocab]`."""

    @abstractmethod
    def _clear(self) -> None:
        """Empty the cache."""

    @final
    def reset(self, position: int = 0) -> None:
        """Forget the sequence; the next token is read at `position`, after that many zeros."""
        self._clear()
        self.position = position

    @final
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed one chunk, whose length is one of `seq_lengths`, at the current position.

        Returns:
            float32 `[S, vocab]` when `every_row`, else `[1, vocab]`.

        Raises:
            ConfigError: a token outside the vocabulary, or the context is full.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"Token {token} is outside the vocabulary of {self.vocab_size} entries; use "
                    "the tokenizer that belongs to the model."
                )
        self._check_room(len(tokens))
        chunk = torch.tensor([list(tokens)], dtype=torch.int64)
        logits = self._forward(chunk, torch.tensor([self.position], dtype=torch.int64))
        self.position += len(tokens)
        return logits[0].to(torch.float32)

    def _check_room(self, count: int) -> None:
        if self.position + count > self.context:
            raise ConfigError(
                f"{self.position} tokens are in the cache and {count} more do not fit its "
                f"{self.context} positions; give fewer, or export with a larger --context."
            )

    @final
    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Continue the sequence by `tokens` and return the last row, float32 `[vocab]`."""
        if not tokens:
            raise ConfigError("There are no tokens to feed; give at least one.")
        self._check_room(len(tokens))
        row, start = torch.empty(0), 0
        for length in split_lengths(len(tokens), self.seq_lengths):
            row = self.step(tokens[start : start + length])[-1]
            start += length
        return row

    @final
    def logits(self, tokens: Sequence[int], position: int = 0) -> torch.Tensor:
        """Return the logits after every one of `tokens`, from an empty cache.

        A program that returns last rows only is fed one token at a time.

        Args:
            tokens: The sequence.
            position: Where its first token is read, see `reset`.

        Returns:
            float32 `[len(tokens), vocab]`.
        """
        self.reset(position)
        self._check_room(len(tokens))
        lengths = self.seq_lengths if self.every_row else (1,)
        rows, start = [], 0
        for length in split_lengths(len(tokens), lengths):
            rows.append(self.step(tokens[start : start + length]))
            start += length
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    @final
    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampler: Sampler | None = None,
    ) -> Iterator[int]:
        """Yield new tokens after `tokens`, until a stop token, the count or a full cache.

        Args:
            tokens: The prompt; the cache is emptied first.
            max_new_tokens: Most tokens to yield.
            stop: Tokens that end the text; not yielded.
            sampler: How a token is chosen; None takes the most likely.
        """
        sampler = sampler or Sampler()
        self.reset()
        row = self.feed(tokens)
        for count in range(1, max_new_tokens + 1):
            token = sampler.choose(row)
            if token in stop:
                return
            yield token
            if count == max_new_tokens or self.position == self.context:
                return
            row = self.step([token])[-1]


@final
class EagerRunner(Runner):
    """A decoder in PyTorch, fp32: the judge of the artifact made from it."""

    # Eager code takes any length; this only bounds the size of the attention scores.
    _LONGEST = 1024

    def __init__(self, decoder: Decoder, label: str) -> None:
        super().__init__()
        decoder.logits = "all"
        self.decoder = decoder
        self.context = decoder.context
        self.vocab_size = decoder.spec.vocab_size
        longest = min(self._LONGEST, decoder.context)
        self.seq_lengths = tuple(range(1, longest + 1))
        self.every_row = True
        self.label = label

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._head(self._hidden(tokens, start_pos))

    def _hidden(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Do what `Decoder.hidden` does without expanding the token table as a whole."""
        table, start = self.decoder.embed_tokens.weight, 0
        x = torch.empty(*tokens.shape, table.shape[1])
        for rows in dense_rows(table):
            inside = (tokens >= start) & (tokens < start + len(rows))
            x[inside] = rows[tokens[inside] - start]
            start += len(rows)
        return self.decoder.blocks(x, start_pos)

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """Do what `Decoder.head` does without expanding the head as a whole."""
        x = self.decoder.norm(x)
        return torch.cat(
            [F.linear(x, rows) for rows in dense_rows(self.decoder.lm_head.weight)], -1
        )

    def at(self, tokens: Sequence[int], position: int, rows: Sequence[int]) -> torch.Tensor:
        """Return the logits after some of `tokens` only, read as `logits` does.

        The head of a large vocabulary costs more than a small model's layers.

        Args:
            tokens: The sequence.
            position: Where its first token is read.
            rows: Which of the tokens.

        Returns:
            float32 `[len(rows), vocab]`.
        """
        self.reset(position)
        self._check_room(len(tokens))
        states, start = [], 0
        with torch.no_grad():
            for length in split_lengths(len(tokens), self.seq_lengths):
                chunk = torch.tensor([list(tokens[start : start + length])])
                states.append(self._hidden(chunk, torch.tensor([position + start]))[0])
                start += length
            return self._head(torch.cat(states)[list(rows)])

    def _clear(self) -> None:
        with torch.no_grad():
            self.decoder.cache.reset()


@final
class ReferenceRunner(Runner):
    """The Core ML program inside a `.pte`, executed by the reference runtime.

    Args:
        path: The `.pte`.
        execution: Numerics, device and memory.

    Attributes:
        program: The Core ML program, for observers.

    Raises:
        ArtifactError: the file is damaged, or its method has another signature than an LLM's.
        ConfigError: the execution asks for what is not there.
    """

    def __init__(self, path: Path, execution: Execution = DECLARED) -> None:
        super().__init__()
        self._method = load_method(path, execution=execution)
        self.label = "reference runtime" + execution_suffix(execution)
        signature = [(spec.dtype, len(spec.shape)) for spec in self._method.inputs]
        if signature != [("int64", 2), ("int64", 1)] or len(self._method.programs) != 1:
            raise ArtifactError(
                f"Method 'forward' of '{path}' takes {signature}; a language model takes tokens "
                "int64 [1, S] and start_pos int64 [1]."
            )
        self.program, constants = self._method.programs[0], self._method.constants
        tokens = [feature for feature in self.program.inputs if len(feature.shape) == 2]
        given = [len(spec.shape) for spec in self._method.outputs]
        if len(tokens) != 1 or given != [3]:
            raise ArtifactError(
                f"Method 'forward' of '{path}' gives outputs of {given} axes; a language model "
                "gives logits [1, S, V] for tokens [1, S]."
            )
        shapes = tokens[0].enumerated or (tokens[0].shape,)
        self.seq_lengths = tuple(sorted(shape[1] for shape in shapes))
        _, rows, self.vocab_size = self._method.outputs[0].shape
        self.every_row = rows != 1
        self.context = _constant(constants, "get_max_context_len", path)

    def constants(self) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """Yield the program's constants, see `CoreMLProgram.constants`."""
        return self._method.programs[0].constants()

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        return self._method(tokens, start_pos).cpu()

    def _clear(self) -> None:
        self._method.reset()


@final
class ExecutorchRunner(Runner):
    """A `.pte` on ExecuTorch's own runtime; on Linux the XNNPACK twin."""

    def __init__(self, path: Path, seq_lengths: tuple[int, ...]) -> None:
        super().__init__()
        from executorch.runtime import Runtime, Verification

        self._load: Callable[[], Any] = lambda: Runtime.get().load_program(
            path, verification=Verification.Minimal
        )
        self.label = "XNNPACK on CPU"
        self.seq_lengths = seq_lengths
        self._clear()
        self.context = self._constant("get_max_context_len")
        self.vocab_size = self._constant("get_vocab_size")
        self.every_row = False

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._method.execute([tokens, start_pos])[0]
        return logits.clone()

    def _clear(self) -> None:
        # The cache lives in the loaded method and nothing resets it but loading it again.
        self._program = self._load()
        self._method = self._program.load_method("forward")


def execution_suffix(execution: Execution) -> str:
    """Return what is not usual about an execution, such as ` (fp32, cuda)`."""
    mode = "" if execution.mode == DECLARED.mode else execution.mode
    device = "" if execution.device == DECLARED.device else execution.device
    told = [word for word in (mode, device, "compiled" if execution.compiled else "") if word]
    return f" ({', '.join(told)})" if told else ""


def _constant(constants: Mapping[str, object], name: str, path: Path) -> int:
    value = constants.get(name)
    if not isinstance(value, int):
        raise ArtifactError(f"'{path}' has no constant method {name}; it is no export of an LLM.")
    return value


def open_runner(bundle: Bundle, execution: Execution = DECLARED) -> Runner:
    """Return the runner for a bundle's program on this machine.

    Raises:
        ArtifactError: the program is damaged, or contradicts the manifest.
        ConfigError: the execution asks for what is not there.
    """
    backend = bundle.manifest["target"]["backend"]
    if backend != "coreml":
        if execution != DECLARED:
            raise ConfigError(
                f"'{bundle.folder}' is lowered for {backend}, whose runtime has no choice of mode "
                "or device; leave both out, or export with --backend coreml."
            )
        # ExecuTorch trusts what it loads.
        check_program(bundle)
        lengths = tuple(bundle.manifest["program"]["seq_lengths"])
        return ExecutorchRunner(bundle.program, lengths)
    return ReferenceRunner(bundle.program, execution)


def program_runner(
    path: Path, backend: str, seq_lengths: tuple[int, ...], execution: Execution
) -> Runner:
    """Return the runner for the program at `path`, lowered for `backend`.

    Args:
        path: The `.pte`.
        backend: `coreml`, or `xnnpack`, whose runtime has no choice of `execution`.
        seq_lengths: Chunk lengths that it accepts.
        execution: Numerics, device and memory.

    Raises:
        ArtifactError: the program is damaged.
    """
    if backend == "coreml":
        return ReferenceRunner(path, execution)
    return ExecutorchRunner(path, seq_lengths)
