"""What `generate --runtime cpp` does: shows the text that the C++ runner made, and keeps figures.

continue_by_cpp(Path("twin"), DECLARED, True, screen, Asked(), "human", "The with", record=None)
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from llm_coreml.bundle.folder import open_bundle
from llm_coreml.cli.conversation import TOKENS, Asked, facts, tell
from llm_coreml.cli.options import print_json
from llm_coreml.cli.terminal import Screen
from llm_coreml.cpp.cpp_text import continue_text_by_cpp
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.output import file_beside, output_error
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED


def continue_by_cpp(
    folder: Path,
    execution: Execution,
    checked: bool,
    screen: Screen,
    asked: Asked,
    form: str,
    prompt: str,
    record: Path | None,
) -> None:
    """Show the text that continues `prompt`.

    Args:
        folder: Of the bundle that is run.
        execution: What was asked of the reference runtime, which has no part in this.
        checked: Refuse a bundle whose files have changed since the export wrote them.
        screen: Where the text is shown.
        asked: How it is made.
        form: `human`, or `json` for one object with what was measured.
        prompt: Text to continue.
        record: A new file for what was measured; None for none.

    Raises:
        LlmCoreMLError: as `continue_text_by_cpp`.
        ConfigError: a mode or a device was asked for.
        OutputError: the file is there already, or cannot be written.
    """
    if execution != DECLARED:
        raise ConfigError(
            "--mode and --device belong to the reference runtime; leave them out, or --runtime cpp."
        )
    if record is not None and record.exists():
        raise OutputError(f"'{record}' exists already; give another name to --record.")
    bundle = open_bundle(folder, checked)
    made = continue_text_by_cpp(
        bundle,
        prompt,
        TOKENS if asked.max_new_tokens is None else asked.max_new_tokens,
        sampling=asked.sampling,
        stop=asked.stop,
        measured=record is not None,
        progress=screen.progress,
    )
    if record is not None:
        try:
            with file_beside(record) as draft:
                draft.write_bytes(made.printed)
        except OSError as error:
            raise output_error(record, error) from None
    text = tell(screen, made.stream, form, bundle.manifest.description.context)
    if form == "json":
        run = asdict(made.run)
        print_json(screen.result.file, {"prompt": prompt, **facts(made.stream, text), "run": run})
