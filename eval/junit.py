"""What became of gates as JUnit XML, which CI systems show as tests.

write_junit(Path("gates.xml"), "out", judge(gates, document))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from llm_coreml.eval.gates import Verdict
from llm_coreml.output import file_beside, output_error
from llm_coreml.printable import MESSAGE, printable

_ELEMENTS = {"failed": "failure", "unmeasured": "error"}


def write_junit(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write a test suite with a case for each gate.

    Args:
        path: The file.
        name: What was evaluated.
        verdicts: What became of its gates.

    Raises:
        OutputError: it cannot be written.
    """
    states = [verdict.state for verdict in verdicts]
    counts = {
        "tests": str(len(states)),
        "failures": str(states.count("failed")),
        "errors": str(states.count("unmeasured")),
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": f"llm-coreml eval {printable(name)}", **counts}
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "llm-coreml.gates", "name": verdict.gate}
        )
        text = printable(verdict.text, MESSAGE)
        if verdict.state in _ELEMENTS:
            ElementTree.SubElement(case, _ELEMENTS[verdict.state], {"message": text})
        else:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(suites)
    try:
        with file_beside(path) as draft:
            ElementTree.ElementTree(suites).write(draft, "utf-8", xml_declaration=True)
    except OSError as error:
        raise output_error(path, error) from None
