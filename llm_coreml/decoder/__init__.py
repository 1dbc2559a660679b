"""One static-graph PyTorch decoder, built from a `DecoderSpec` and written for the compiler."""

from llm_coreml.decoder.decoder import Decoder as Decoder
from llm_coreml.decoder.spec import DecoderSpec as DecoderSpec
