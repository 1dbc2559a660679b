"""From a model to the decoder that a program is made of, quantized one matrix at a time.

In come a `Model` and a `Job`; out goes a `Quantized`, by one road (`quantized`) for exports and
evaluations alike. `plan` chooses a format for every matrix, `formats` makes the tensors,
`calibrate` chooses codes for a text, `rotate` turns weights first, `fill` reads and stores block by
block. Weights are asked for by the decoder's names, and codes are never rounded twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_coreml.quantize.formats.schemes import SCHEMES as SCHEMES
from llm_coreml.quantize.formats.schemes import Scheme as Scheme

if TYPE_CHECKING:
    from llm_coreml.quantize.plan.plan import QuantizationPlan as QuantizationPlan
    from llm_coreml.quantize.plan.plan import make_plan as make_plan


def __getattr__(name: str) -> Any:
    # Loaded on first use: formats are listed and shown without torch, which plans bring.
    if name in ("QuantizationPlan", "make_plan"):
        from llm_coreml.quantize.plan import plan

        return getattr(plan, name)
    raise AttributeError(f"module 'llm_coreml.quantize' has no attribute '{name}'")
