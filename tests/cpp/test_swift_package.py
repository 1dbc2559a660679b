"""The Swift package tells a run as the runner in C++ does, and says that it has not been run."""

from __future__ import annotations

import re
from pathlib import Path

from llm_coreml.cpp.device_run import device_run_schema

PACKAGE = Path(__file__).parent.parent.parent / "swift"
SOURCES = PACKAGE / "Sources" / "BundleRunner"


def fields(text: str) -> set[str]:
    """Return the stored properties of a struct, as JSON calls them."""
    names = re.findall(r"^  (?:public )?(?:let|var) (\w+)(?::| =)", text, re.M)
    return {re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name) for name in names}


def test_the_report_has_the_fields_of_the_schema() -> None:
    schema = device_run_schema()
    text = (SOURCES / "Report.swift").read_text()
    assert fields(text.partition("public struct Report")[2].partition("\n  ///")[0]) == set(
        schema["properties"]
    )
    sampling = (SOURCES / "Sampler.swift").read_text().partition("public struct Sampling")[2]
    assert fields(sampling.partition("\n\n")[0]) == set(
        schema["properties"]["sampling"]["properties"]
    )


def test_what_has_not_been_run_says_so() -> None:
    for path in (PACKAGE / "Package.swift", *PACKAGE.glob("Sources/*/*.swift")):
        text = path.read_text()
        assert "// Not yet run: no Apple device was at hand." in text, path.name
        assert max(map(len, text.splitlines())) <= 100
