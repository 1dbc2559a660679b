"""An export as a model of lm-eval, registered there as `llm-coreml` once this is imported.

import llm_coreml.eval.harness.adapter
lm_eval.simple_evaluate("llm-coreml", model_args={"pretrained": "out"}, tasks=["arc_easy"])

It answers as lm-eval's own model for Hugging Face does (its 0.4.13), with the same
tokens, windows, cuts and stops, so that numbers differ by what the export computes alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.harness.continuations import score
from llm_coreml.eval.harness.generation import asked_of, complete
from llm_coreml.eval.harness.subject import NamedTokens, Subject, open_subject
from llm_coreml.reference.program.execution import Execution

MODEL = "llm-coreml"
# As lm-eval's own, where a task does not say.
_MOST_TOKENS = 256

Message = dict[str, str]
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class SubjectModel(TemplateLM):  # type: ignore[misc]
    """A subject behind lm-eval's interface.

    Args:
        subject: The model.
        max_length: Most tokens to read at once; None is the program's context.
        add_bos_token: Whether a text is begun; None as the tokenizer does it.
        prefix_token_id: What stands before a text without a context; None is what begins a text.
        on_progress: Told of the share done of each kind of request, 0 to 1.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__()
        context = subject.runner.context
        if max_length is not None and not 1 <= max_length <= context:
            raise ConfigError(
                f"max_length is {max_length}, and the program's context {context}; give 1 to "
                f"{context}, or export with a larger --context."
            )
        self.subject = subject
        self.max_length = max_length or context
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id
        self._on_progress = on_progress

    @property
    def tokenizer(self) -> NamedTokens:
        """Special tokens and chat template, under the names that lm-eval asks for."""
        return self.subject.names

    @property
    def tokenizer_name(self) -> str:
        """What tells requests made for this tokenizer and template from others."""
        told = repr((self.subject.names, self.subject.tokenizer.beginning))
        return f"{self.subject.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises ArtifactError if none does."""
        ends = (self.subject.names.eos_token_id, *self.subject.stop)
        found = next((token for token in ends if token is not None), None)
        if found is None:
            raise ArtifactError(
                f"'{self.subject.name}' names no token that begins or ends a text, which scoring "
                "starts with; give one as prefix_token_id."
            )
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        for token in (self._prefix, self.subject.names.bos_token_id):
            if token is not None:
                return token
        return self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of a generation, where a task does not say."""
        return _MOST_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the tokens of `string`.

        Args:
            string: A text; what begins a text may stand in it already.
            add_special_tokens: Whether it is begun; None as the model does it, and never twice.
        """
        tokenizer = self.subject.tokenizer
        begun = self._add_bos if add_special_tokens is None else add_special_tokens
        if begun is False:
            return tokenizer.encode(string)
        if begun is None:
            return tokenizer.prompt(string)
        ids, beginning = tokenizer.encode(string), [*tokenizer.beginning] or [self.prefix_token_id]
        twice = add_special_tokens is None and ids[: len(beginning)] == beginning
        return ids if twice else [*beginning, *ids]

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `tokens`."""
        return self.subject.tokenizer.decode(tokens, special=not skip_special_tokens)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of a continuation for each request."""
        return self._loglikelihood_tokens([self._pair(*request.args) for request in requests])

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return a context, which is never empty, and a continuation as tokens."""
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        ids = self.tok_encode(continuation, add_special_tokens=False)
        # A continuation that begins a text by itself is its own context.
        cut = 1 if ids[:1] == [self.prefix_token_id] else 0
        return (context, continuation), [self.prefix_token_id], ids[cut:]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of the tokens of each continuation."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for done, (at, answer) in enumerate(score(self.subject.runner, pairs, self.max_length)):
            answers[at] = (answer.logprob, answer.greedy)
            texts = requests[at][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[at])
            self._on_progress((done + 1) / len(requests))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of a whole text for each request, window by window."""
        sums = []
        for done, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            answers = [answer for _, answer in score(self.subject.runner, pairs, self.max_length)]
            sums.append(sum(answer.logprob for answer in answers))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
            self._on_progress((done + 1) / len(requests))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation for each request, up to the texts that end it."""
        texts = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        # Those with a common beginning follow one another.
        for done, at in enumerate(sorted(range(len(requests)), key=prompts.__getitem__)):
            context, settings = requests[at].args
            asked = asked_of(settings, self.max_gen_toks)
            room = self.max_length - asked.most
            if room < 1:
                raise ConfigError(
                    f"A task asks for {asked.most} new tokens, and the context of "
                    f"{self.max_length} positions has no room for them and a prompt; give fewer "
                    "with --gen-kwargs max_gen_toks=N, or export with a larger --context."
                )
            prompt = prompts[at][-room:] or [self.prefix_token_id]
            texts[at] = complete(self.subject, prompt, asked)
            self.cache_hook.add_partial("generate_until", (context, settings), texts[at])
            self._on_progress((done + 1) / len(requests))
        return texts

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            chat_history: Messages with `role` and `content`.
            add_generation_prompt: Begin the assistant's answer; False goes on with the last
                message, which is the beginning of one.

        Raises:
            ArtifactError: there is no chat template, or it is damaged.
            ConfigError: it refuses the messages.
        """
        template = self.subject.template
        if template is None:
            raise ArtifactError(
                f"'{self.subject.name}' has no chat template, as models without tuning for chat "
                "have none; leave --apply-chat-template out."
            )
        try:
            text = template.render(chat_history, answer=add_generation_prompt)
        except ConfigError:
            # Some templates know no system message, which lm-eval then leaves out.
            chat_history = [each for each in chat_history if each["role"] != "system"]
            text = template.render(chat_history, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        before, found, _ = text.rpartition(last)
        return before + found if found else text

    def get_model_info(self) -> dict[str, str | int]:
        """Return what results tell of the model."""
        return dict(self.subject.info)


@register_model(MODEL)
class ExportedModel(SubjectModel):
    """A bundle behind lm-eval's interface, made from lm-eval's `model_args`.

    Args:
        pretrained: Folder that an export wrote; or a model's folder or hub id.
        max_length: As `SubjectModel`.
        add_bos_token: As `SubjectModel`.
        prefix_token_id: As `SubjectModel`.
        mode: Numerics of the reference runtime.
        device: Where it computes; None is the CPU.
        checked: Refuse files that have changed since the export wrote them.
        batch_size: Texts read at once, of which there is one.
        max_batch_size: The same.

    Raises:
        ArtifactError: the bundle is damaged, or has no tokenizer.
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        mode: str = "declared",
        device: str | None = None,
        checked: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        for size in (batch_size, max_batch_size):
            if size not in (None, 1, "1", "auto"):
                raise ConfigError(
                    f"The batch size is {size}, and a program has one cache; leave it out, or "
                    "give 1."
                )
        subject = open_subject(Path(pretrained), Execution(mode, device or "cpu"), checked)
        super().__init__(
            subject,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
