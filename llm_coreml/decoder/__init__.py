"""One static-graph PyTorch decoder, built from a `DecoderSpec` and written for the compiler.

In come sizes and options as data, later weights, one at a time; out come logits, eagerly and as an
exported graph. No family is known here by its name: what an architecture needs is a field of
`spec` and code that reads it. Modules declare how their matrices hang together (`wiring`) and what
they remember (`states`), and whoever quantizes or lowers asks them. Names of modules and buffers
are in the bytes of every program.
"""

from llm_coreml.decoder.decoder import Decoder as Decoder
from llm_coreml.decoder.decoder import skeleton as skeleton
from llm_coreml.decoder.spec import DecoderSpec as DecoderSpec
