"""Weight formats that Core ML can hold, and how they are made."""

from llm_coreml.quantize.formats.schemes import SCHEMES as SCHEMES
from llm_coreml.quantize.formats.schemes import Scheme as Scheme
from llm_coreml.quantize.plan.plan import QuantizationPlan as QuantizationPlan
from llm_coreml.quantize.plan.plan import make_plan as make_plan
