"""Text by the runner in C++: the tokenizer here, the program there.

made = continue_text_by_cpp(open_bundle(Path("twin")), "The with statement", 40)
"".join(made.stream), made.run.tokens_per_second
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from llm_coreml.bundle.folder import Bundle
from llm_coreml.bundle.text_stream import TextStream, stop_texts
from llm_coreml.config.values import checked_count
from llm_coreml.cpp.cpp_run import CppRequest, check_runs_here, finished_run, parsed_run
from llm_coreml.cpp.device_run import DeviceRun
from llm_coreml.errors import ArtifactError
from llm_coreml.progress import Progress
from llm_coreml.runtime.runner import Finish
from llm_coreml.runtime.sampling import GREEDY, Sampling
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.detokenizer import Detokenizer

# What a measurement is made of: runs that count, after some that do not.
_RUNS, _WARM_UP = 3, 1


@dataclass(frozen=True)
class CppText:
    """A text that the runner made.

    Attributes:
        stream: Its pieces.
        run: What the runner tells of it.
        printed: The same as it printed it.
    """

    stream: TextStream
    run: DeviceRun
    printed: bytes


def continue_text_by_cpp(
    bundle: Bundle,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    measured: bool = False,
    progress: Progress | None = None,
) -> CppText:
    """Return the continuation of `prompt`, all of it made already.

    Args:
        bundle: What to run.
        prompt: Text to continue.
        max_new_tokens: Most tokens to add.
        sampling: How tokens are chosen.
        stop: Texts that end it, or one, beside the model's own end tokens; they are left out.
        measured: Make it several times, for figures that repeat.
        progress: Told of stages.

    Raises:
        ArtifactError: the program is damaged, or the bundle has no tokenizer.
        ConfigError: as `run_cpp`, or an argument is out of range.
        OutputError: as `run_cpp`.
    """
    check_runs_here(bundle)
    checked_count("max_new_tokens", max_new_tokens)
    if not bundle.tokenizer.is_file():
        raise ArtifactError(
            f"'{bundle.folder}' was exported without a tokenizer; export again with one, or give "
            "tokens to the runner itself."
        )
    tokenizer = Tokenizer(bundle.tokenizer)
    tokens, texts = tokenizer.prompt(prompt), stop_texts(stop)
    asked = CppRequest(
        tokens,
        max_new_tokens,
        sampling,
        [tokenizer.special[text] for text in texts if text in tokenizer.special],
        *((_RUNS, _WARM_UP) if measured else ()),
    )
    printed = finished_run(bundle, asked, progress)
    run = parsed_run(printed, bundle.program)
    pieces = TextStream(len(tokens), _made(run), Detokenizer(tokenizer, after=tokens), texts)
    return CppText(pieces, run, printed)


def _made(run: DeviceRun) -> Generator[int, None, Finish]:
    yield from run.ids
    return run.finish
