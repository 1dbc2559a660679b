"""What exports answer to the same question, for a report to show side by side.

answer_of(Path("out"), "What is a list?").text
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.bundle.language_model import load
from llm_coreml.errors import ArtifactError
from llm_coreml.eval.report.page import Sample

_TOKENS = 96


def answer_of(bundle: Path, prompt: str) -> Sample:
    """Return the answer of a bundle, chosen greedily; a model without a template goes on instead.

    Raises:
        ArtifactError: the bundle is damaged, or has no tokenizer.
        ConfigError: the prompt is longer than the context.
    """
    model = load(bundle)
    try:
        _ = model.template
    except ArtifactError:
        text = model.generate(prompt, max_new_tokens=_TOKENS)
    else:
        text = model.chat([{"role": "user", "content": prompt}], max_new_tokens=_TOKENS)
    return Sample(bundle.resolve().name, text)
