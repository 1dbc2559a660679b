"""How many wrong programs do the product's checks notice?

Whether a mutant computes another function than its original is decided by running both, without
rounding, on texts that read every token and every position; whether it is noticed, by opening it
and verifying it as an export does. The two know nothing of each other.

    survey = Survey(mutants(count=200, seed=0, folder=Path("scratch")))
    print(survey.table())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from artifacts import Artifact, lower
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError, ConfigError, VerificationError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.verify.logits import verify, verify_conversion
from llm_coreml.verify.passes import plan_passes
from llm_coreml.verify.reading import read_text
from mutations import Mutation, Package, draw
from tiny import llama

CONTEXT, VOCABULARY, LENGTHS = 32, 64, (1, 4, 8)
# Logits of one program, computed twice, are equal; a millionth is far below any rounding of fp16.
SAME = 1e-6
UNROUNDED = Execution(mode="fp32", memory_budget=0)
DECLARED = Execution(memory_budget=0)

PROGRAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int4-group, fused": ({}, {}),
    "codebook, decomposed, biases": (
        {"attention_bias": True, "num_hidden_layers": 1},
        {"bits": 4, "scheme": "codebook", "target": "ane"},
    ),
    "int8, tied, all logits": (
        {"tie_word_embeddings": True, "num_hidden_layers": 1},
        {"scheme": "int8-channel", "embedding": "int8-channel", "logits": "all"},
    ),
}


@dataclass(frozen=True)
class Mutant:
    """A changed program and what became of it.

    Attributes:
        program: which one was changed.
        mutation: the change.
        changed: whether it computes another function, or none.
        noticed: which check refused it; empty if none did.
        reason: what that check said.
    """

    program: str
    mutation: Mutation
    changed: bool
    noticed: str
    reason: str


def original(name: str, folder: Path) -> Artifact:
    """Lower one of `PROGRAMS`."""
    sizes, settings = PROGRAMS[name]
    base = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    model = llama(**{**base, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT, **sizes})
    config = ExportConfig(context=CONTEXT, seq_lengths=LENGTHS, **settings)
    return lower(model, config, folder / f"{len(name)}.pte")


def mutants(count: int, seed: int, folder: Path) -> list[Mutant]:
    """Make and judge `count` mutants, as many of each program as can be."""
    judged: list[Mutant] = []
    for number, name in enumerate(PROGRAMS):
        share = (count - len(judged)) // (len(PROGRAMS) - number)
        trial = Trial(name, original(name, folder))
        judged += [trial.judge(mutation) for mutation in draw(trial.package, share, seed + number)]
    return judged


class Trial:
    """One program, the inputs that tell it from others, and its checks."""

    def __init__(self, name: str, artifact: Artifact) -> None:
        self.name = name
        self.package = Package(artifact.path)
        self._artifact = artifact
        self._logits = _probe(ReferenceRunner(artifact.path, UNROUNDED))
        order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7)).tolist()
        every_row = PROGRAMS[name][1].get("logits") == "all"
        self._reading = read_text(
            artifact.decoder,
            order[:CONTEXT],
            "random",
            plan_passes(LENGTHS, CONTEXT),
            every_row=every_row,
            natural=True,
            in_fp16=True,
        )

    def judge(self, mutation: Mutation) -> Mutant:
        """Say whether `mutation` changes the function, and whether it is noticed."""
        with self.package.changed(mutation):
            noticed, reason, probed = self._noticed()
        changed = True
        if probed is not None:
            differs = (probed - self._logits).abs() > SAME * self._logits.abs().max()
            changed = bool((differs | probed.isnan()).any())
        return Mutant(self.name, mutation, changed, noticed, reason)

    def _noticed(self) -> tuple[str, str, torch.Tensor | None]:
        path, where = self._artifact.path, "loading"
        probed = None
        try:
            unrounded = ReferenceRunner(path, UNROUNDED)
            where = "a call"
            probed = _probe(unrounded)
            where = "unrounded"
            conversion = verify_conversion(unrounded, self._artifact.decoder, self._reading)
            where = "as declared"
            verify(ReferenceRunner(path, DECLARED), self._reading, conversion)
        except (ArtifactError, ConfigError, VerificationError) as error:
            return where, str(error), probed
        return "", "", probed


def _probe(runner: Runner) -> torch.Tensor:
    """Return logits after texts that together read every token, position, length and order."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(VOCABULARY, generator=generator).tolist()
    first, second = order[:CONTEXT], order[CONTEXT:]
    texts = (
        (0, first, (8, 8, 8, 8)),
        (0, second, (4, 1, 8, 8, 8, 1, 1, 1)),
        (CONTEXT - 13, first, (1, 4, 8)),
        (9, second, (8, 1, 4, 1)),
    )
    rows = []
    for start, tokens, lengths in texts:
        runner.reset(start)
        at = 0
        for length in lengths:
            rows.append(runner.step(tokens[at : at + length]))
            at += length
    return torch.cat(rows)


@final
class Survey:
    """What became of many mutants."""

    def __init__(self, found: Sequence[Mutant]) -> None:
        self.changed = [mutant for mutant in found if mutant.changed]
        self.equivalent = [mutant for mutant in found if not mutant.changed]
        self.missed = [mutant for mutant in self.changed if not mutant.noticed]

    @property
    def share(self) -> float:
        """How many of the mutants that compute something else are noticed."""
        return 1 - len(self.missed) / len(self.changed)

    def table(self) -> str:
        """Return the figures by kind of change, and what was missed or is equivalent."""
        columns = ("loading", "a call", "unrounded", "as declared")
        lines = [f"{'change':24}{'noticed':>12}" + "".join(f"{name:>13}" for name in columns)]
        for kind in sorted({mutant.mutation.kind for mutant in self.changed}):
            lines.append(_row(kind, [m for m in self.changed if m.mutation.kind == kind], columns))
        lines.append(_row("all", self.changed, columns))
        for title, mutants in (("missed", self.missed), ("equivalent", self.equivalent)):
            lines.append(f"{title}: {len(mutants)}")
            for mutant in mutants:
                early = f", refused: {mutant.noticed}" if mutant.noticed else ""
                change = f"{mutant.mutation.kind}: {mutant.mutation.what}"
                lines.append(f"  {mutant.program}: {change}{early}")
        return "\n".join(lines)


def _row(kind: str, found: Sequence[Mutant], columns: Sequence[str]) -> str:
    where = Counter(mutant.noticed for mutant in found)
    noticed = f"{len(found) - where['']}/{len(found)}"
    return f"{kind:24}{noticed:>12}" + "".join(f"{where[name]:>13}" for name in columns)
