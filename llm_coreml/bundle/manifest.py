"""What `manifest.json` says of an export, typed; its JSON schema is `manifest.schema.json`.

    manifest = Manifest.from_json(json.loads(text))      # what fits the schema
    manifest.program.bytes, manifest.quantization.linear.label, manifest.verification.mean_kl

Fields that default to None are what earlier releases did not record.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_coreml.artifact.description import (
    INPUTS,
    MAIN_FUNCTION,
    Description,
    MethodForm,
    Partition,
)
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.bundle.typed_json import LEFT_OUT, named, read_record, write_record
from llm_coreml.heads import LOGITS, Head
from llm_coreml.targets import BACKENDS
from llm_coreml.verify.verification import Verification

# In version 1, `config` had no sections, and `spec` the sizes of one layer for all. Before
# version 3, no files were listed beside the program, and there was no checksum.
MANIFEST_VERSION = 3
READ_VERSIONS = (1, 2, MANIFEST_VERSION)
CHECKSUM = "checksum"


@dataclass(frozen=True)
class Source:
    """What was exported.

    Attributes:
        kind: Where it came from.
        name: Hub id, recipe or class; of a folder its own name alone, and no path to it.
        revision: Commit of a hub id.
        sha256: Hash of the tensors that the decoder is made of.
    """

    kind: Literal["folder", "hub", "live", "bundled"]
    name: str
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class Group:
    """Matrices of one role, as they are stored.

    Attributes:
        scheme: The scheme's name, `mixed` if there are several.
        label: The scheme in words.
        bits: Bits of a code; None if there are several schemes.
        bits_per_weight: Stored bits per weight, scales and tables included.
        bytes: What they take; 0 where another group holds them.
        matrices: How many there are.
    """

    scheme: str
    label: str
    bits: int | None
    bits_per_weight: float
    bytes: int
    matrices: int


@dataclass(frozen=True)
class RotatedSpace:
    """How one space of activations is rotated.

    Attributes:
        size: Its width.
        factors: The matrices that the rotation is made of, in words.
    """

    size: int
    factors: str


@dataclass(frozen=True)
class Rotations:
    """What was rotated before quantization.

    Attributes:
        residual: The residual stream.
        heads: The values of the attention heads.
        seed: Of the signs.
    """

    residual: RotatedSpace | None
    heads: RotatedSpace | None
    seed: int


@dataclass(frozen=True)
class UsedText:
    """What was learnt from a text.

    Attributes:
        method: By which method.
        text: The text's name.
        tokens: How many were read.
        windows: In how many pieces.
        sha256: Hash of the pieces.
    """

    method: str
    text: str
    tokens: int
    windows: int
    sha256: str


@dataclass(frozen=True)
class Tuned:
    """What tuning on the calibration text did.

    Attributes:
        steps: Steps taken.
        kl_before: Divergence from the original on that text, in nats per token.
        kl_after: The same, afterwards.
    """

    steps: int
    kl_before: float
    kl_after: float


@dataclass(frozen=True)
class Calibration(UsedText):
    """The text that codes were chosen on.

    Attributes:
        tuning: What came after.
    """

    tuning: Tuned | None = None


@dataclass(frozen=True)
class Allocation(UsedText):
    """The text that mixed formats were chosen on.

    Attributes:
        kl: Estimated divergence of all linear layers, in nats per token.
    """

    kl: float


@dataclass(frozen=True)
class Matrix:
    """The scheme of one matrix.

    Attributes:
        shape: Rows and columns.
        scheme: The class of the scheme as `type`, and its fields.
        bytes: What it takes.
        kl: Estimated divergence if it alone were quantized, in nats per token; None if that was
            not measured.
    """

    shape: tuple[int, ...]
    scheme: Mapping[str, Any]
    bytes: int
    kl: float | None = field(default=None, metadata=LEFT_OUT)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        rows, columns = self.shape
        return 8 * self.bytes / (rows * columns)


@dataclass(frozen=True)
class Plan:
    """The scheme of every matrix; `--plan` takes it back.

    Attributes:
        matrices: By the decoder's names.
    """

    matrices: Mapping[str, Matrix]


@dataclass(frozen=True)
class Import:
    """How true the export is to a checkpoint that was quantized already.

    Attributes:
        format: The formats of its matrices.
        matrices: How many there are.
        exactness: `exact` if each weight is the very number that the format defines.
        largest_error: Largest difference, as a share of the distance between two codes.
        tensor: The matrix that has it; None if there is none.
    """

    format: str
    matrices: int
    exactness: Literal["exact", "inexact"]
    largest_error: float
    tensor: str | None


@dataclass(frozen=True)
class Quantization:
    """How the weights are stored.

    Attributes:
        linear: The linear layers of all blocks.
        embedding: The token table.
        lm_head: The output head, and whether the table is both (`tied`).
        untied_bytes: What it costs to store the head separately, though it has the same weights.
        bits_per_weight: Stored bits per weight over all, a tied table counted once.
        rotation: What was rotated before.
        calibration: What the codes were chosen on; None if they are rounded to nearest.
        allocation: What mixed formats were chosen on.
        plan: The scheme of every matrix.
        imported: None unless the checkpoint was quantized already, and taken as it was.
        expanded: What it was quantized in, if its values were treated as any others.
        codes_of: SHA-256 of the program whose codes it has.
    """

    linear: Group
    embedding: Group
    lm_head: Group
    tied: bool
    untied_bytes: int
    bits_per_weight: float
    rotation: Rotations | None = None
    calibration: Calibration | None = None
    allocation: Allocation | None = None
    plan: Plan | None = field(default=None, metadata=LEFT_OUT)
    imported: Import | None = field(default=None, metadata=named("import"))
    expanded: str | None = field(default=None, metadata=LEFT_OUT)
    codes_of: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Program:
    """The `.pte`.

    Attributes:
        file: Its name in the bundle.
        bytes: Its size.
        sha256: Its hash.
        method: The method that reads single tokens; inputs, output and lengths are this one's.
        inputs: Element type and shape of each argument by name.
        output: Those of the logits.
        states: Those of what the program remembers, by name.
        context: Positions that it remembers.
        seq_lengths: Chunk lengths that a call accepts.
        constant_methods: What ExecuTorch's LLM runners ask of it.
        form: The kind of lowering.
        every_row: A call gives a row of logits for each of its tokens.
        methods: All methods that read tokens.
        why: What the form is for, and what was asked for.
        head: What is given of each row; every logit if it is absent.
        partitions: What Core ML runs one after the other; None where that is one program.
    """

    file: str
    bytes: int
    sha256: str
    method: str
    inputs: Mapping[str, str]
    output: str
    states: Mapping[str, str]
    context: int
    seq_lengths: tuple[int, ...]
    constant_methods: Mapping[str, Constant]
    form: str | None = field(default=None, metadata=LEFT_OUT)
    every_row: bool | None = field(default=None, metadata=LEFT_OUT)
    methods: Mapping[str, MethodForm] | None = field(default=None, metadata=LEFT_OUT)
    why: str | None = field(default=None, metadata=LEFT_OUT)
    head: str | None = field(default=None, metadata=LEFT_OUT)
    partitions: tuple[Partition, ...] | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Target:
    """What the program is made for.

    Attributes:
        backend: What runs it: `coreml` or `xnnpack`.
        name: The target's name.
        compute_unit: Core ML's name of the compute unit.
        minimum_os: Oldest system.
        opset: Core ML's opset.
        compute_precision: Precision of activations.
    """

    backend: Literal["coreml", "xnnpack"]
    name: str
    compute_unit: str
    minimum_os: str
    opset: str
    compute_precision: str


@dataclass(frozen=True)
class File:
    """A file of the bundle, as it was written.

    Attributes:
        bytes: Its size.
        sha256: Its hash.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """An export, as its folder tells of it.

    Attributes:
        version: Of this form.
        source: What was exported.
        spec: Sizes and options of the decoder, see `DecoderSpec`.
        config: Settings, see `ExportConfig`.
        rebuild: The command line that makes the same program again; empty for a live model.
        quantization: How the weights are stored.
        program: The `.pte`.
        target: What it is made for.
        versions: Of Python and of the packages that made it.
        verification: What verifying it found.
        files: The files beside program and manifest, by name.
        checksum: SHA-256 of all else that is told here, see `seal.checksum`.
    """

    version: int
    source: Source
    spec: Mapping[str, Any]
    config: Mapping[str, Any]
    rebuild: tuple[str, ...]
    quantization: Quantization
    program: Program
    target: Target
    versions: Mapping[str, str]
    verification: Verification
    files: Mapping[str, File] | None = field(default=None, metadata=LEFT_OUT)
    checksum: str | None = field(default=None, metadata=LEFT_OUT)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a parsed `manifest.json` that fits `manifest_schema`."""
        return read_record(cls, value)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        return write_record(self)

    @property
    def listed(self) -> dict[str, File]:
        """The program and the files beside it; manifests of the first releases list no other."""
        program = File(self.program.bytes, self.program.sha256)
        return {self.program.file: program, **(self.files or {})}

    def plan_json(self) -> dict[str, Any] | None:
        """Return the plan as `--plan` reads it; None where the release did not record it."""
        plan = self.quantization.plan
        return None if plan is None else write_record(plan)

    @property
    def description(self) -> Description:
        """What the program offers to a runner; of earlier releases it follows from what is told."""
        program, backend = self.program, self.target.backend
        functions = (MAIN_FUNCTION,) if BACKENDS[backend].runtime == "reference" else ()
        only = MethodForm(INPUTS, program.output, program.seq_lengths, functions)
        return Description(
            form=program.form or "unknown",
            backend=backend,
            methods=program.methods or {program.method: only},
            every_row=" S," in program.output if program.every_row is None else program.every_row,
            states=program.states,
            context=program.context,
            constant_methods=program.constant_methods,
            why=program.why or "",
            head=Head.of(program.head or str(LOGITS)),
            partitions=program.partitions or (),
        )


def manifest_schema() -> dict[str, Any]:
    """Return the JSON schema of `manifest.json` that ships in the package."""
    text = (
        importlib.resources.files("llm_coreml.bundle").joinpath("manifest.schema.json").read_text()
    )
    schema: dict[str, Any] = json.loads(text)
    return schema
