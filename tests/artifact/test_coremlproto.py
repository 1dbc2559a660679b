"""Loading a program must not execute coremltools, and must not disturb it in either order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import coremltools as ct

from llm_coreml.artifact.coremlproto import model_class
from llm_coreml.reference import load_method

FIRST = """
import sys
from llm_coreml.reference import load_method
from llm_coreml.artifact.coremlproto import model_class
load_method(sys.argv[1])
assert not [name for name in sys.modules if name.split(".")[0] == "coremltools"]
"""
THEN = """
import coremltools as ct
data = ct.proto.Model_pb2.Model(specificationVersion=7).SerializeToString()
parsed = model_class()()
parsed.ParseFromString(data)
assert ct.models.MLModel(parsed, skip_model_load=True).get_spec().specificationVersion == 7
load_method(sys.argv[1])
"""


def test_before_coremltools(sample_pte: Path) -> None:
    command = [sys.executable, "-c", FIRST + THEN, str(sample_pte)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_after_coremltools(sample_pte: Path) -> None:
    load_method(sample_pte)
    parsed = model_class()()
    parsed.ParseFromString(ct.proto.Model_pb2.Model(specificationVersion=7).SerializeToString())
    assert ct.models.MLModel(parsed, skip_model_load=True).get_spec().specificationVersion == 7
