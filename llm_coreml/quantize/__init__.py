"""From a model to the decoder that a program is made of, quantized one matrix at a time.

In come a `Model` and a `Job`; out goes a `Quantized`, by one road (`quantized`) for exports and
evaluations alike. `plan` chooses a format for every matrix, `formats` makes the tensors,
`calibrate` chooses codes for a text, `rotate` turns weights first, `fill` reads and stores block by
block. Weights are asked for by the decoder's names, and codes are never rounded twice.
"""

from llm_coreml.quantize.formats.schemes import SCHEMES as SCHEMES
from llm_coreml.quantize.formats.schemes import Scheme as Scheme
from llm_coreml.quantize.plan.plan import QuantizationPlan as QuantizationPlan
from llm_coreml.quantize.plan.plan import make_plan as make_plan
