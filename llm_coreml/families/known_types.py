"""What is known of the causal LMs of `transformers` that have no family here, and why not.

    known_of("mixtral")       # Known('planned', 'a mixture of experts')
    known_of("llama")         # None: it has a family, or nobody knows it

The refusal of a model_type and `docs/model-types.md` say the same, since both are made of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

Outlook = Literal["planned", "dense", "inside", "other"]


@final
@dataclass(frozen=True)
class Known:
    """What a model_type without a family is.

    Attributes:
        outlook: `planned`, `dense` (a decoder that could have a family, and has none yet), `inside`
            (its text model is read, by a model_type of its own) or `other`, which nothing is
            planned for.
        what: In words, to follow "it is".
    """

    outlook: Outlook
    what: str

    @property
    def sentence(self) -> str:
        """What a refusal says of it."""
        return f"It is {self.what}{_ENDS[self.outlook]}"


_ENDS: Mapping[Outlook, str] = {
    "planned": ", which is planned.",
    "dense": "; it has no family yet.",
    "inside": ", of which the text model is read by its own model_type.",
    "other": ", which is not planned.",
}
# By what they are; names in the order of `transformers`.
_PLANNED = {
    "a mixture of experts": (
        "afmoe aria_text beam cohere2_moe dbrx dots1 ernie4_5_moe exaone_moe flex_olmo flint "
        "glm4_moe gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 jetmoe "
        "kolibri1 laguna mellum mimo_v2_flash minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe "
        "sarvam_moe solar_open"
    ),
    "a decoder with layers of state in the place of attention": (
        "bamba falcon_h1 falcon_mamba lfm2 lfm3 mamba mamba2 olmo_hybrid qwen3_5_text "
        "recurrent_gemma zamba zamba2"
    ),
    "a mixture of experts with layers of state in the place of attention": (
        "granitemoehybrid jamba lara_mini lfm2_moe nemotron_h qwen3_5_moe_text qwen3_next"
    ),
}
_INSIDE = {
    "a model of several modalities": (
        "dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama "
        "moss_transcribe_diarize qwen3_5 qwen3_5_moe qwen4_exp"
    ),
}
_OTHER = {
    "a mixture of experts with latent attention, of a size that no device holds": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note_text "
        "glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash sarvam_mla"
    ),
    "a mixture of experts with layers of state and latent attention": "bailing_hybrid kimi_linear",
    "a mixture of experts of a size that no device holds": (
        "llama4_text minimax minimax_m3_vl_text qwen4_exp_text"
    ),
    "a mixture of experts with relative positions and convolutions of its own": (
        "inkling2_loop_text inkling2_text inkling_text"
    ),
    "a mixture of experts with compressed convolutional attention": "zaya",
    "a decoder with latent attention": "minicpm3 youtu",
    "a recurrent model of an older kind": "rwkv xlstm",
    "an encoder that can be run as a decoder": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
        "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
    ),
    "the decoder of an encoder with a decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
        "prophetnet trocr whisper"
    ),
    "a decoder of audio codes": "moshi musicgen musicgen_melody",
    "a model that sees or hears, whose text part is no model alone": "git phi4_multimodal",
    "a drafter that reads the states of another model": (
        "gemma4_assistant gemma4_unified_assistant"
    ),
    "a decoder of four residual streams, whose activations are made sparse": "gemma3n_text",
    "a model whose layers are run several times": "dory hrm_text",
    "a model of bytes in patches of any length": "blt",
    "a decoder with attention of its own (differences of two)": "diffllama",
    "a decoder with attention of its own (masks that are learned)": "doge",
    "a decoder with attention of its own (hashes)": "reformer",
    "a decoder with attention of its own (permutations)": "xlnet",
    "a model that reads its prompt in both directions": "cpmant",
}
_DENSE = {
    "a dense decoder whose head has fewer rows than its token table": "apertus1p5_text",
    "a dense decoder whose layers differ in rotary embedding": "cohere_compass_text",
    "a dense decoder with a further matrix and norm before its head": "modernbert-decoder",
}
_KINDS: tuple[tuple[Outlook, Mapping[str, str]], ...] = (
    ("planned", _PLANNED),
    ("dense", _DENSE),
    ("inside", _INSIDE),
    ("other", _OTHER),
)
_KNOWN = {
    name: Known(outlook, what)
    for outlook, kinds in _KINDS
    for what, names in kinds.items()
    for name in names.split()
}


def known_of(model_type: str) -> Known | None:
    """Return what is known of a model_type without a family, None if nothing is."""
    return _KNOWN.get(model_type)


def known_names() -> list[str]:
    """Return every model_type that something is known of."""
    return sorted(_KNOWN)
