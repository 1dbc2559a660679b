"""`docs/targets.md` says which formats each target and system take, and is made from the code.

python tests/lower/test_formats_table.py      # writes the table anew
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cases import cases
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.pipeline import export
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.schemes import SCHEMES
from llm_coreml.targets import TARGETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "targets.md"
BEGIN = "<!-- formats: made by tests/lower/test_formats_table.py -->\n"
END = "<!-- end of formats -->\n"
FORMATS = [*(name for name in SCHEMES if name != "codebook"), "codebook:4", "codebook:4:whole"]
SYSTEMS = ("iOS16", "iOS18", "iOS26")
# One of each: lengths and cache change nothing of what weights may be stored as.
SAMPLES = [
    ("int8-channel", "iOS16", "gpu", {"seq_lengths": (1, 8), "kv_cache": "inputs"}),
    ("codebook:4:whole", "iOS16", "ane", {"seq_lengths": (8,), "kv_cache": "inputs"}),
    ("int4-group", "iOS18", "cpu", {"seq_lengths": "1..8"}),
    ("codebook:4", "iOS18", "ane", {"seq_lengths": (1, 8)}),
    ("int4-channel", "iOS18", "all", {"functions": "prefill:8,decode:1"}),
    ("int3-group", "iOS26", "gpu", {"seq_lengths": "1..8", "kv_cache": "inputs"}),
    ("mxfp4", "iOS26", "cpu", {"seq_lengths": (1,)}),
]


def config_of(scheme: str, system: str, target: str) -> ExportConfig:
    cache = "inputs" if system == "iOS16" else "state"
    return ExportConfig(
        context=32,
        scheme=scheme,
        embedding="none",
        minimum_os=system,
        target=target,
        kv_cache=cache,
        group_size=32,
    )


def table() -> tuple[list[str], list[str]]:
    """Return the lines of the table, and those of the reasons that it refers to."""
    from tiny import small_spec

    reasons: list[str] = []
    heads = [f"`{target}`, {system}" for target, system in itertools.product(TARGETS, SYSTEMS)]
    lines = ["| format | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    spec = small_spec(hidden_size=64, intermediate_size=128)
    for scheme in FORMATS:
        cells = []
        for target, system in itertools.product(TARGETS, SYSTEMS):
            try:
                make_plan(resolve(config_of(scheme, system, target), spec), spec)
                cells.append("yes")
            except LlmCoreMLError as error:
                name = scheme.partition(":")[0]
                told = str(error).partition(". Use ")[0].replace(name, "this format") + "."
                if told not in reasons:
                    reasons.append(told)
                cells.append(f"({reasons.index(told) + 1})")
        lines.append(f"| `{scheme}` | " + " | ".join(cells) + " |")
    return lines, [f"{number}. {told}" for number, told in enumerate(reasons, 1)]


def text() -> str:
    """Return what stands between the marks."""
    lines, reasons = table()
    return "\n".join(["", *lines, "", *reasons, "", ""])


def test_the_document_has_the_table_of_formats_of_today() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written.partition(BEGIN)[2].partition(END)[0] == text()


@pytest.mark.parametrize("sample", cases(list(map(repr, SAMPLES)), set(map(repr, SAMPLES[1:]))))
def test_samples_of_what_goes_together_are_made_and_verified(sample: str, tmp_path: Path) -> None:
    from tiny import llama, save

    (found,) = [each for each in SAMPLES if repr(each) == sample]
    scheme, system, target, settings = found
    config = replace(config_of(scheme, system, target), **{"kv_cache": None, **settings})
    source = save(llama(hidden_size=64, intermediate_size=128), tmp_path / "model")
    bundle = export(source, output=tmp_path / "out", config=config, cache=False)
    assert bundle.manifest.verification.mean_kl < 1e-3


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text() + END + rest.partition(END)[2], encoding="utf-8")
