"""A GGUF file with nothing beside it: its configuration, its tokenizer, and its parts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gguf_files import tiny, write
from llm_coreml import load
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.config import ExportConfig
from llm_coreml.decoder.rope import inverse_frequencies
from llm_coreml.errors import CheckpointError, LlmCoreMLError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.pipeline import export
from llm_coreml.tokenizer import Tokenizer as BundleTokenizer
from tiny import expected_logits, tokens_for

TEXT = (
    "def total(items):\n    return 12 +  345 * items[0]\n\n\t# It's 7.5% of 1,234,567 -- don't!\n"
    "The naïve café costs £3 in 2024 ... 東京は日本の首都です。 Привет, мир! 🙂  end  \n"
)
BATTERY = [
    *TEXT.splitlines(keepends=True),
    "x =  1",
    "a  12 b",
    " leading",
    "trailing ",
    "",
    "   ",
    "\n\n\n",
    "I'LL we'Ve",
    "1234567890",
    "<s> <|end|>",
]


def gpt2_vocabulary(splitter: Any) -> tuple[Tokenizer, list[str], list[str]]:
    """Train a byte-level tokenizer; return it with its tokens and merges in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    ordered = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [each if isinstance(each, str) else " ".join(each) for each in state["merges"]]
    return tokenizer, ordered, merges


def gpt2(
    name: str | None, tokens: list[str], merges: list[str], template: str | None = None
) -> Callable[[gguf.GGUFWriter], None]:
    def vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if name is not None:
            writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if index < 3 else 1 for index in range(len(tokens))])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(2)
        if template is not None:
            writer.add_chat_template(template)

    return vocabulary


def digits_first() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def test_its_configuration_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny(max_position_embeddings=512, rope_theta=5e5, num_hidden_layers=2)
    write(tmp_path / "model.gguf", model, {})
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").to_dict()
    ours = dict(open_checkpoint(tmp_path / "model.gguf").config)
    assert ours.pop("quantization_config") == {"quant_method": "gguf"}
    assert ours.pop("architectures") == ["LlamaForCausalLM"]
    assert ours == {name: theirs[name] for name in ours}
    rest = LlamaConfig().to_dict()
    assert {name for name in rest if name not in ours and theirs[name] != rest[name]} <= {
        "transformers_version",
        "architectures",
        "_name_or_path",
    }


def test_biases_and_heads_of_other_sizes(tmp_path: Path) -> None:
    model = tiny(attention_bias=True, mlp_bias=True, head_dim=128, num_key_value_heads=1)
    meant = write(tmp_path / "model.gguf", model, {"q_proj": Kind.Q8_0, "k_proj": Kind.Q5_1})
    checkpoint = open_model(tmp_path).checkpoint
    assert checkpoint.names() == meant.keys() == model.state_dict().keys()
    for name, values in meant.items():
        assert np.array_equal(checkpoint.tensor(name, torch.float32).numpy(), values), name


def test_it_exports_to_what_transformers_computes(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True, vocab_size=420)
    _, tokens, merges = gpt2_vocabulary(digits_first())
    source = tmp_path / "model.gguf"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    meant = write(
        source, model, {"up_proj": Kind.Q4_0}, vocabulary=gpt2("smollm", tokens, merges, template)
    )
    state = model.state_dict()
    for name, values in meant.items():
        state[name].copy_(torch.from_numpy(np.asarray(values, np.float32)))
    config = ExportConfig(context=32, seq_lengths=(1, 8), logits="all", embedding="none")
    bundle = export(source, output=tmp_path / "out", config=config, cache=False)
    ids = tokens_for(420, 12)
    expected = expected_logits(model, ids)
    assert (load(bundle.folder).logits(ids) - expected).abs().max() < 0.02 * expected.abs().max()
    assert bundle.manifest.quantization.expanded is None
    assert (bundle.folder / "chat_template.jinja").read_text() == template
    assert bundle.manifest.program.constant_methods["get_eos_ids"] == [1, 2]
    assert bundle.tokenizer.is_file()


def test_its_values_are_calibrated_and_the_card_says_of_what(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True, vocab_size=420)
    _, tokens, merges = gpt2_vocabulary(digits_first())
    source = tmp_path / "model.gguf"
    kinds = {"up_proj": Kind.Q4_1, "q_proj": Kind.IQ2_XS}
    write(source, model, kinds, vocabulary=gpt2("smollm", tokens, merges))
    config = ExportConfig(
        context=32, seq_lengths=(1, 8), bits=4, calibrate="bundled", calibration_tokens=256
    )
    bundle = export(source, output=tmp_path / "out", config=config, cache=False)
    stored = open_bundle(bundle.folder).manifest.quantization
    assert stored.imported is None and stored.calibration is not None
    assert stored.expanded == "GGUF IQ2_XS, GGUF Q4_1"
    card = (bundle.folder / "README.md").read_text()
    assert "values of GGUF IQ2_XS, GGUF Q4_1, calibrated by" in card


def encoder(source: Path, folder: Path) -> BundleTokenizer:
    """Return the tokenizer that a bundle of `source` would hold."""
    checkpoint = open_checkpoint(source)
    checkpoint.save_tokenizer(folder)
    return BundleTokenizer(folder / "tokenizer.json")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "splitter"),
    [
        ("smollm", digits_first()),
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "llama-bpe",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
    ],
)
def test_texts_are_split_as_the_file_names(name: str, splitter: Any, tmp_path: Path) -> None:
    original, tokens, merges = gpt2_vocabulary(splitter)
    source = tmp_path / "model.gguf"
    write(source, tiny(vocab_size=420), {}, vocabulary=gpt2(name, tokens, merges))
    found = encoder(source, tmp_path / "out")
    for text in BATTERY:
        ids = found.encode(text)
        assert ids == original.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == original.decode(ids), text
    assert found.encode("<|end|>") == [2]
    assert found.beginning == ()


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2", "gpt-2", "dbrx", "gpt-4o"])
def test_transformers_splits_the_same_where_it_knows_the_name(name: str, tmp_path: Path) -> None:
    _, tokens, merges = gpt2_vocabulary(digits_first())
    source = tmp_path / "model.gguf"
    write(source, tiny(vocab_size=420), {}, vocabulary=gpt2(name, tokens, merges))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    found = encoder(source, tmp_path / "out")
    for text in BATTERY:
        assert found.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_a_way_to_split_that_is_not_known_leaves_the_bundle_without_text(tmp_path: Path) -> None:
    _, tokens, merges = gpt2_vocabulary(digits_first())
    source = tmp_path / "model.gguf"
    write(source, tiny(vocab_size=420), {}, vocabulary=gpt2("kimi-k2", tokens, merges))
    with pytest.raises(CheckpointError, match=r"splits a text as 'kimi-k2' does.*tokenizer.json"):
        encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vocabularies_that_cannot_be_converted(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write(source, tiny(), {}, vocabulary=lambda writer: None)
    with pytest.raises(CheckpointError, match=r"model.gguf holds no tokenizer"):
        encoder(source, tmp_path / "out")
    write(source, tiny(), {}, vocabulary=gpt2("gpt-2", ["a" * 5000, "</s>", "<|end|>"], []))
    with pytest.raises(CheckpointError, match=r"holds tokens of more than 4096 bytes"):
        encoder(source, tmp_path / "out")
    write(source, tiny(), {}, vocabulary=gpt2("gpt-2", ["a"], ["a b"]))
    with pytest.raises(CheckpointError, match=r"cannot be converted: .*Put the model's"):
        encoder(source, tmp_path / "out")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(prefix: bool, tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text(TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        hard_vocab_limit=False,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    count = model.vocab_size()

    def vocabulary(writer: gguf.GGUFWriter) -> None:
        kinds = [(2, model.is_unknown), (3, model.is_control), (6, model.is_byte)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(index) for index in range(count)])
        writer.add_token_scores([model.get_score(index) for index in range(count)])
        writer.add_token_types(
            [next((kind for kind, is_it in kinds if is_it(i)), 1) for i in range(count)]
        )
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if not prefix:
            writer.add_add_space_prefix(False)

    source = tmp_path / "model.gguf"
    write(source, tiny(vocab_size=count), {}, vocabulary=vocabulary)
    found = encoder(source, tmp_path / "out")
    for text in BATTERY[:-1]:
        assert found.encode(text) == model.encode(text), text
        assert found.decode(found.encode(text)) == model.decode(model.encode(text)), text
    assert found.beginning == (1,)


SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors(**changes: Any) -> np.ndarray[Any, Any]:
    """Return what llama.cpp's converter stores of a scaling, by `transformers`' frequencies."""
    config = tiny(head_dim=128, rope_parameters={**SCALING, **changes}).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** (-torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    return (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0},
        {"factor": 4.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 4096},
        {"rope_theta": 1e4, "original_max_position_embeddings": 1024},
    ],
)
def test_the_scaling_of_rope_that_a_tensor_holds(changes: dict[str, Any], tmp_path: Path) -> None:
    parameters = {**SCALING, **changes}
    stored = factors(**changes)
    model = tiny(head_dim=128, rope_parameters=parameters)
    write(
        tmp_path / "model.gguf",
        model,
        {},
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", stored),
    )
    (rope,) = open_model(tmp_path).spec.rotary
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, device="cpu")
    found = inverse_frequencies(rope).to(torch.float64)
    assert torch.allclose(found, scaled.to(torch.float64), rtol=1e-4, atol=0)
    if changes.get("factor", 8.0) in (8.0, 32.0) and "rope_theta" not in changes:
        assert (rope.factor, rope.original_max_position_embeddings) == (parameters["factor"], 8192)
    model.config.save_pretrained(tmp_path)
    assert open_model(tmp_path).spec.rotary[0].factor == parameters["factor"]


def test_factors_that_are_no_known_scaling_are_refused(tmp_path: Path) -> None:
    model, source = tiny(head_dim=128), tmp_path / "model.gguf"

    def scaled(values: np.ndarray[Any, Any]) -> None:
        array = values.astype(np.float32)
        write(source, model, {}, extra=lambda w: w.add_tensor("rope_freqs.weight", array))

    for wrong in (np.linspace(1, 9, 64), np.full(64, 0.5), np.r_[np.ones(63), np.nan]):
        scaled(wrong)
        with pytest.raises(UnsupportedError, match=r"scales RoPE by factors of .*config.json"):
            open_model(source)
    scaled(factors())
    tiny(head_dim=128, rope_parameters={**SCALING, "factor": 32.0}).config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"by other factors than config.json does \(llama3"):
        open_model(source)


def put(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    return lambda writer: getattr(writer, add[type(value)])(key, value)


@pytest.mark.parametrize(
    ("extra", "kind", "message"),
    [
        (
            put("llama.expert_count", 8),
            UnsupportedError,
            r"model_type 'mixtral' is not supported.*mixture of experts",
        ),
        (put("llama.logit_scale", 0.5), UnsupportedError, r"gives llama.logit_scale, which is not"),
        (put("llama.rope.scaling.type", "other"), UnsupportedError, r"scales RoPE by 'other'"),
        (
            put("llama.rope.scaling.yarn_ext_factor", 0.5),
            UnsupportedError,
            r"gives rope.scaling.yarn_ext_factor, of which",
        ),
    ],
)
def test_metadata_that_changes_what_is_computed(
    extra: Callable[[gguf.GGUFWriter], None],
    kind: type[LlmCoreMLError],
    message: str,
    tmp_path: Path,
) -> None:
    write(tmp_path / "model.gguf", tiny(), {}, extra=extra)
    with pytest.raises(kind, match=message):
        open_model(tmp_path / "model.gguf")


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    write(tmp_path / "sha256-1a2b", tiny(), {})
    assert open_model(tmp_path / "sha256-1a2b").spec.hidden_size == 256
    assert open_model(tmp_path).spec.hidden_size == 256
    (tmp_path / "LICENSE").write_text("text")
    with pytest.raises(CheckpointError, match=r"is neither an existing"):
        open_checkpoint("a" * 300 + "/b/c")
    with pytest.raises(CheckpointError, match=r"LICENSE' is neither an existing .*gguf file"):
        open_model(tmp_path / "LICENSE")


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    write(tmp_path / "model.gguf", tiny(), {}, extra=extra)
    (rope,) = open_model(tmp_path / "model.gguf").spec.rotary
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def test_other_architectures_are_told_by_their_family(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", tiny(), {}, architecture="plamo")
    with pytest.raises(UnsupportedError, match=r"'plamo' is not supported.*nearest to 'llama'"):
        open_model(tmp_path / "model.gguf")
    write(tmp_path / "model.gguf", tiny(), {}, architecture="qwen3moe")
    with pytest.raises(UnsupportedError, match=r"'qwen3_moe' is not supported.* mixture of expe"):
        open_model(tmp_path / "model.gguf")


def test_a_sliding_window_is_mistral(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", tiny(), {}, extra=put("llama.attention.sliding_window", 32))
    spec = open_model(tmp_path / "model.gguf").spec
    assert spec.model_type == "mistral"
    assert [layer.mixer.window for layer in spec.layers] == [32]


def test_metadata_that_is_missing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"does not give llama.embedding_length. Put the"):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**31, r"promises 2147483648 blocks and holds 1"),
        ("llama.embedding_length", 2**31, r"'token_embd.weight' in .* is \[64, 256\], and its"),
        ("llama.attention.head_count", 0, r"'blk.0.attn_q.weight' in .* promises \[0, 256\]"),
        ("llama.attention.head_count_kv", 2**31, r"'blk.0.attn_k.weight' in"),
        ("llama.feed_forward_length", 2**31, r"'blk.0.ffn_up.weight' in"),
    ],
)
def test_sizes_are_held_against_the_tensors(
    key: str, value: int, message: str, tmp_path: Path
) -> None:
    source = tmp_path / "model.gguf"
    write(source, tiny(), {})
    octets = bytearray(source.read_bytes())
    struct.pack_into("<I", octets, octets.index(key.encode() + b"\4\0\0\0") + len(key) + 4, value)
    source.write_bytes(octets)
    with pytest.raises(CheckpointError, match=message):
        open_model(source)


def split(folder: Path, model: Any, declared: int = 2) -> dict[str, Any]:
    """Write a model of two layers in two parts; return its values."""
    meant: dict[str, Any] = {}
    for number in range(2):

        def extra(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", declared)

        def only(name: str, number: int = number) -> bool:
            return (".layers.1." in name) == bool(number)

        path = folder / f"tiny-Q8_0-0000{number + 1}-of-00002.gguf"
        kinds = {"up_proj": Kind.Q8_0, "q_proj": Kind.Q8_0}
        meant |= write(path, model, kinds, extra=extra, only=only)
    return meant


def test_a_model_in_parts(tmp_path: Path) -> None:
    meant = split(tmp_path, tiny(num_hidden_layers=2))
    first, second = sorted(tmp_path.iterdir())
    for source in (tmp_path, first, second):
        checkpoint = open_model(source).checkpoint
        assert checkpoint.names() == meant.keys()
        for name, values in meant.items():
            assert np.array_equal(checkpoint.tensor(name, torch.float32).numpy(), values), name
    assert checkpoint.where("model.layers.1.mlp.up_proj.weight") == second.name


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny(num_hidden_layers=2)
    split(tmp_path, model)
    first, second = sorted(tmp_path.iterdir())
    second.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=rf"one of 2 parts .* lacks '{second.name}'"):
        open_model(first)
    lone = first.rename(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"one of 2 parts of a model.*llama-gguf-split"):
        open_model(lone)
    lone.unlink()
    (tmp_path / "kept").unlink()
    split(tmp_path, model, declared=3)
    with pytest.raises(CheckpointError, match=r"part 1 of 2, but its header gives .*count = 3"):
        open_model(tmp_path)
    split(tmp_path, model)
    write(second, model, {}, extra=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(CheckpointError, match=r"part 2 of 2, but its header gives split.no = 0"):
        open_model(tmp_path)
    split(tmp_path / ".", model)
    write(tmp_path / "other.gguf", model, {})
    with pytest.raises(CheckpointError, match=r"2 GGUF models: 'other.gguf', 'tiny-Q8_0-00001"):
        open_model(tmp_path)
