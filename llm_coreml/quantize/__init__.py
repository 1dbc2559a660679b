"""Weight formats that Core ML can hold, and how they are made."""

from llm_coreml.quantize.plan import QuantizationPlan as QuantizationPlan
from llm_coreml.quantize.plan import make_plan as make_plan
from llm_coreml.quantize.schemes import SCHEMES as SCHEMES
from llm_coreml.quantize.schemes import Scheme as Scheme
