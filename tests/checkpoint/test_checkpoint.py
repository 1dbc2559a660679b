"""The checkpoint reader against real, tiny `transformers` checkpoints, whole and damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_coreml.checkpoint import Checkpoint, Source, check_tensors, open_checkpoint
from llm_coreml.checkpoint import checkpoint as checkpoint_module
from llm_coreml.checkpoint import files as checkpoint_files
from llm_coreml.checkpoint.checkpoint import WEIGHT_DTYPES
from llm_coreml.errors import (
    CheckpointError,
    ConfigError,
    LlmCoreMLError,
    OutputError,
    UnsupportedError,
)

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def llama(tied: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def small_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def models_by_tie() -> dict[bool, Any]:
    return {tied: llama(tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, models_by_tie: dict[bool, Any]) -> Path:
    """Folders `one` and `shards` (tied), `untied` and `untied-shards`."""
    root = tmp_path_factory.mktemp("saved")
    for tied, name in ((True, ""), (False, "untied")):
        for shards in (False, True):
            folder = root / ("-".join(part for part in (name, "shards" * shards) if part) or "one")
            size = "10KB" if shards else "1GB"
            models_by_tie[tied].save_pretrained(folder, max_shard_size=size)
            small_tokenizer().save_pretrained(folder)
    return root


@pytest.fixture
def one(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "one", tmp_path / "one"))


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name.replace("__", "."): value for name, value in changes.items()}, path)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: checkpoint.shape(name) for name in checkpoint.names()}


# Reading


@pytest.mark.parametrize(
    ("folder", "tied"),
    [("one", True), ("shards", True), ("untied", False), ("untied-shards", False)],
)
def test_folder_is_bit_equal_to_the_model(
    saved: Path, models_by_tie: dict[bool, Any], folder: str, tied: bool
) -> None:
    checkpoint = open_checkpoint(saved / folder)
    state = models_by_tie[tied].state_dict()
    assert checkpoint.names() == state.keys() - ({HEAD} if tied else set())
    for name in checkpoint.names():
        read = checkpoint.tensor(name, torch.bfloat16)
        assert torch.equal(read, state[name]) and read.dtype == torch.bfloat16
        assert checkpoint.shape(name) == tuple(state[name].shape)
        assert checkpoint.dtype(name) == torch.bfloat16
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.source == Source("folder", str(saved / folder))


def test_shards_are_several_files(saved: Path) -> None:
    checkpoint = open_checkpoint(str(saved / "shards"))
    assert len({checkpoint.where(name) for name in checkpoint.names()}) > 2


@pytest.mark.parametrize("stored", WEIGHT_DTYPES)
@pytest.mark.parametrize("wanted", WEIGHT_DTYPES)
def test_cast_is_the_one_of_torch(
    one: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(checkpoint_module, "_CHUNK", 7)
    value = torch.randn(5, 3, 4).to(stored)
    save_file({"a": value, "scalar": value[0, 0, 0].clone(), "none": value[:0].clone()},
              one / "model.safetensors")  # fmt: skip
    checkpoint = open_checkpoint(one)
    for name, want in (("a", value), ("scalar", value[0, 0, 0]), ("none", value[:0])):
        read = checkpoint.tensor(name, wanted)
        assert read.dtype == wanted and read.shape == want.shape and read.is_contiguous()
        assert torch.equal(read, want.to(wanted))


def test_a_read_is_the_callers_own(saved: Path, models_by_tie: dict[bool, Any]) -> None:
    for checkpoint in (open_checkpoint(saved / "one"), open_checkpoint(models_by_tie[True])):
        before = checkpoint.tensor(NORM, torch.bfloat16)
        checkpoint.tensor(NORM, torch.bfloat16).zero_()
        assert torch.equal(checkpoint.tensor(NORM, torch.bfloat16), before)
        assert bool(before.any())


def test_opening_reads_no_tensor_data(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Spy:
        def __init__(self, path: Path, framework: str) -> None:
            self.file: Any = safe_open(path, framework=framework)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            reads.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(checkpoint_files, "safe_open", Spy)
    checkpoint = open_checkpoint(saved / "shards")
    check_tensors(checkpoint, shapes_of(checkpoint))
    assert reads == []
    checkpoint.tensor(NORM, torch.float32)
    assert reads == [NORM]


def test_unknown_name_and_type(saved: Path, models_by_tie: dict[bool, Any]) -> None:
    for checkpoint in (open_checkpoint(saved / "one"), open_checkpoint(models_by_tie[True])):
        with pytest.raises(CheckpointError, match=r"no tensor 'model.nrm.weight'.*'model.norm"):
            checkpoint.tensor("model.nrm.weight", torch.float16)
        with pytest.raises(ConfigError, match="not int8"):
            checkpoint.tensor(NORM, torch.int8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wanted", WEIGHT_DTYPES)
def test_value_that_is_not_finite(
    one: Path, monkeypatch: pytest.MonkeyPatch, bad: float, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(checkpoint_module, "_CHUNK", 5)
    value = torch.ones(4, 6)
    value[2, 3] = value[3, 1] = bad
    edit_weights(one, bad=value)
    checkpoint = open_checkpoint(one)
    with pytest.raises(
        CheckpointError, match=rf"'bad' in model.safetensors is {bad} at \[2, 3\].*Download"
    ):
        checkpoint.tensor("bad", wanted)
    assert bool(checkpoint.tensor(NORM, wanted).any())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for size in (1, 7, 64, 1031):
        for at in range(0, size, 1 if size < 100 else 31):
            value = torch.randn(size).to(dtype)
            assert checkpoint_module._all_finite(value)
            value[at] = bad
            assert not checkpoint_module._all_finite(value)


def test_overflow_of_float16(one: Path) -> None:
    value = torch.tensor([1.0, 65504.0, -70000.0, 80000.0])
    edit_weights(one, big=value)
    checkpoint = open_checkpoint(one)
    with pytest.raises(
        CheckpointError, match=r"'big' in model.safetensors is -70000 at \[2\].*float16, 65504"
    ):
        checkpoint.tensor("big", torch.float16)
    assert torch.equal(checkpoint.tensor("big", torch.float32), value)
    edit_weights(one, big=value[:2].clone())
    assert open_checkpoint(one).tensor("big", torch.float16)[1] == 65504


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_type_that_is_no_weight(one: Path, dtype: torch.dtype) -> None:
    edit_weights(one, mask=torch.ones(2, 3).to(dtype))
    checkpoint = open_checkpoint(one)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"'mask' in model.safetensors is stored as {name}"):
        checkpoint.tensor("mask", torch.float16)
    with pytest.raises(CheckpointError, match=f"1 not bfloat16.*'mask' in .* is {name}"):
        check_tensors(checkpoint, shapes_of(checkpoint))


def test_float_types_are_the_only_weights_but_others_may_lie_beside_them(one: Path) -> None:
    edit_weights(one, mask=torch.ones(2).bool())
    checkpoint = open_checkpoint(one)
    expected = shapes_of(checkpoint)
    del expected["mask"]
    check_tensors(checkpoint, expected, optional=["mask"])


# Hash


def test_hash_is_of_the_content(
    saved: Path, one: Path, monkeypatch: pytest.MonkeyPatch, models_by_tie: dict[bool, Any]
) -> None:
    whole = open_checkpoint(saved / "one").sha256()
    monkeypatch.setattr(checkpoint_module, "_CHUNK", 11)
    assert len(whole) == 64
    assert open_checkpoint(saved / "shards").sha256() == whole
    assert open_checkpoint(models_by_tie[True]).sha256() == whole
    assert open_checkpoint(saved / "untied").sha256() != whole
    norm = load_file(one / "model.safetensors")[NORM]
    norm[-1] += 1
    edit_weights(one, model__norm__weight=norm)
    assert open_checkpoint(one).sha256() != whole


def test_hash_is_the_documented_one(one: Path) -> None:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("hcafbgde")}
    save_file(tensors, one / "model.safetensors")
    digest = hashlib.sha256()
    for name in "abcdefgh":
        digest.update(f'["{name}", "float32", [2]]\n'.encode())
        digest.update(tensors[name].numpy().tobytes())
    assert open_checkpoint(one).sha256() == digest.hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, 2, dtype=torch.float16)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ],
)
def test_hash_tells_names_types_and_shapes(one: Path, other: dict[str, torch.Tensor]) -> None:
    save_file({"a": torch.zeros(2, 3)}, one / "model.safetensors")
    first = open_checkpoint(one).sha256()
    save_file(other, one / "model.safetensors")
    assert open_checkpoint(one).sha256() != first


# Live models


@pytest.mark.parametrize(("tied", "folder"), [(True, "one"), (False, "untied")])
def test_live_equals_folder(
    saved: Path, models_by_tie: dict[bool, Any], tied: bool, folder: str
) -> None:
    live, files = open_checkpoint(models_by_tie[tied]), open_checkpoint(saved / folder)
    assert live.names() == files.names()
    for name in files.names():
        assert live.shape(name) == files.shape(name) and live.dtype(name) == files.dtype(name)
        want = files.tensor(name, torch.float32)
        assert torch.equal(live.tensor(name, torch.float32), want)
    assert files.config.items() <= live.config.items()
    assert live.generation_config == files.generation_config
    assert live.source == Source("live", "LlamaForCausalLM") and live.tokenizer_files == {}
    check_tensors(live, shapes_of(files))


def test_tied_name_is_readable_and_expected_or_not(models_by_tie: dict[bool, Any]) -> None:
    live = open_checkpoint(models_by_tie[True])
    assert live.tied() == {HEAD: EMBED}
    want = live.tensor(EMBED, torch.float16)
    assert torch.equal(live.tensor(HEAD, torch.float16), want)
    check_tensors(live, shapes_of(live) | {HEAD: (64, 32)})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' in the live model is"):
        check_tensors(live, shapes_of(live) | {HEAD: (65, 32)})


@pytest.mark.parametrize("view", [lambda whole: whole[1:], lambda whole: whole.view(32, 64).T])
def test_another_view_of_the_same_storage_is_not_tied(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = llama(False)
    other = view(model.model.embed_tokens.weight.detach())
    model.lm_head.weight = torch.nn.Parameter(other)
    live = open_checkpoint(model)
    assert live.tied() == {} and live.shape(HEAD) == tuple(other.shape)
    assert torch.equal(live.tensor(HEAD, torch.float32), other.float())


def test_live_values_are_checked() -> None:
    model = llama(False)
    with torch.no_grad():
        model.model.norm.weight[4] = float("nan")
    live = open_checkpoint(model)
    with pytest.raises(CheckpointError, match=r"in the live model is nan at \[4\]"):
        live.tensor(NORM, torch.float16)


@pytest.mark.parametrize("source", ["one", "live"])
def test_tokenizer_is_written(
    saved: Path, tmp_path: Path, models_by_tie: dict[bool, Any], source: str
) -> None:
    tokenizer = small_tokenizer()
    checkpoint = (
        open_checkpoint(models_by_tie[True], tokenizer=tokenizer)
        if source == "live"
        else open_checkpoint(saved / "one")
    )
    written = checkpoint.save_tokenizer(tmp_path / "new" / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= written.keys()
    for name, path in written.items():
        assert path.parent == tmp_path / "new" / "out" and path.is_file()
        assert json.loads(path.read_text()) == json.loads((saved / "one" / name).read_text())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written to"):
        checkpoint.save_tokenizer(tmp_path / "file")


def test_no_tokenizer(one: Path, tmp_path: Path, models_by_tie: dict[bool, Any]) -> None:
    (one / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json.*save_pretrained"):
        open_checkpoint(one).save_tokenizer(tmp_path / "out")
    with pytest.raises(CheckpointError, match="tokenizer=tokenizer"):
        open_checkpoint(models_by_tie[True]).save_tokenizer(tmp_path / "out")


class Packed(torch.Tensor):
    """Stands for the tensor subclasses that torchao and FSDP put into a model."""


def test_live_models_that_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="Linear has no transformers config"):
        open_checkpoint(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"meta device.*device_map"):
        open_checkpoint(llama(True).to("meta"))
    model = llama(False)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM has a quantization_config"):
        open_checkpoint(model)
    model = llama(False)
    packed = torch.zeros(64, 32).as_subclass(Packed)
    model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight' is a Packed"):
        open_checkpoint(model)


# What is expected of the tensors


def test_all_disagreements_are_told_at_once(saved: Path) -> None:
    checkpoint = open_checkpoint(saved / "one")
    expected = shapes_of(checkpoint)
    check_tensors(checkpoint, expected)
    del expected[NORM]
    expected[EMBED] = (65, 32)
    expected |= {f"absent.{i}": (1,) for i in range(7)}
    with pytest.raises(CheckpointError) as error:
        check_tensors(checkpoint, expected)
    text = str(error.value)
    assert "7 missing: 'absent.0', 'absent.1'" in text and "'absent.4' and 2 more" in text
    assert "'absent.5'" not in text
    assert f"1 surplus: '{NORM}'" in text
    assert f"1 misshapen: '{EMBED}' in model.safetensors is [64, 32], not [65, 32]" in text
    assert text.endswith("download both again.")


def test_optional_covers_surplus_only(one: Path) -> None:
    edit_weights(one, layers__0__own_table__inv_freq=torch.ones(4))
    checkpoint = open_checkpoint(one)
    expected = shapes_of(checkpoint)
    del expected["layers.0.own_table.inv_freq"]
    check_tensors(checkpoint, expected, optional=["*.own_table.inv_freq"])
    with pytest.raises(CheckpointError, match="1 surplus"):
        check_tensors(checkpoint, expected, optional=["*.own_table"])
    with pytest.raises(CheckpointError, match="1 missing"):
        check_tensors(checkpoint, expected | {"a.bias": (1,)}, optional=["*.inv_freq", "*.bias"])


# Damaged files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(path.read_bytes() + b"tail"),
        lambda path: path.write_bytes((20).to_bytes(8, "little") + b"{not json" * 30),
        lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
    ],
)
def test_damaged_weights(one: Path, shards: Path, damage: Callable[[Path], Any]) -> None:
    for folder, name in ((one, "model.safetensors"), (shards, "model-00002-of-00004.safetensors")):
        damage(folder / name)
        with pytest.raises(CheckpointError, match=rf"{name} is not a whole.*Download it again"):
            open_checkpoint(folder)


def test_file_that_goes_bad_after_opening(one: Path) -> None:
    checkpoint = open_checkpoint(one)
    truncate(one / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{NORM}' cannot be read from .*safetensors"):
        checkpoint.tensor(NORM, torch.float16)
    (one / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read from"):
        checkpoint.sha256()


def test_shard_that_is_absent(shards: Path) -> None:
    (shards / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004.safetensors is absent"):
        open_checkpoint(shards)


def test_index_with_a_tensor_that_no_shard_holds(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    shard = "model-00001-of-00004.safetensors"
    edit_json(index, lambda value: value["weight_map"].update(ghost=shard))
    with pytest.raises(CheckpointError, match=rf"index.json names .*'ghost' \({shard}\)"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    "file",
    [
        "../one/model.safetensors",
        "/etc/model.safetensors",
        "sub/../../one/model.safetensors",
        "..\\one\\model.safetensors",
        "C:model.safetensors",
    ],
)
def test_index_may_not_leave_the_folder(one: Path, shards: Path, file: str) -> None:
    index = shards / "model.safetensors.index.json"
    edit_json(index, lambda value: value["weight_map"].update({EMBED: file}))
    with pytest.raises(CheckpointError, match=rf"'{EMBED}' into .*not a plain file name"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "only .safetensors files"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "only .safetensors files"),
    ],
)
def test_index_that_is_damaged(shards: Path, text: str, message: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"index.json.*{message}"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'["llama"]', "must hold a JSON object, not list"),
        (b"{}", "has no model_type"),
        (b'{"model_type": 3}', "has no model_type"),
    ],
)
def test_config_that_is_damaged(one: Path, content: bytes | None, message: str) -> None:
    (one / "config.json").unlink()
    if content is not None:
        (one / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(one)


def test_generation_config_that_is_damaged(one: Path) -> None:
    (one / "generation_config.json").write_text("{,")
    with pytest.raises(CheckpointError, match=r"generation_config.json cannot be read"):
        open_checkpoint(one)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_unknown_quantization_is_refused(one: Path, key: str) -> None:
    edit_json(one / "config.json", lambda value: value.update({key: None}))
    open_checkpoint(one)
    edit_json(one / "config.json", lambda value: value.update({key: {"quant_method": "aqlm"}}))
    (note,) = open_checkpoint(one).notes
    assert "no tensor is quantized" in note
    tensors = load_file(one / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.codes"] = torch.ones(2, 2, dtype=torch.int16)
    save_file(tensors, one / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"{key} aqlm.*unquantized checkpoint"):
        open_checkpoint(one)


def test_packed_four_bit_tensor_is_refused(one: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (one / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UnsupportedError, match=r"'w' in .* is stored as F4"):
        open_checkpoint(one)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickles_are_refused_unread(one: Path, name: str) -> None:
    (one / "model.safetensors").unlink()
    (one / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=rf"'{name}'.*never loaded.*save_pretrained\(folder"):
        open_checkpoint(one)


def test_folder_without_weights(one: Path, shards: Path) -> None:
    (one / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors and no .*pytorch_model.bin"):
        open_checkpoint(one)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"00001.* but no model.safetensors and no .*index"):
        open_checkpoint(shards)


# What a source may be


@pytest.mark.parametrize(
    "source", ["", " ", "nowhere", "./no/where", "../a", "a/b/c", Path("no/where"), 5, None]
)
def test_source_that_is_nothing(source: Any) -> None:
    with pytest.raises(CheckpointError, match=r"neither an existing folder, a hub id \(org/name\)"):
        open_checkpoint(source)


def test_settings_that_no_one_reads(saved: Path, models_by_tie: dict[bool, Any]) -> None:
    with pytest.raises(ConfigError, match="revision 'main'"):
        open_checkpoint(saved / "one", revision="main")
    with pytest.raises(ConfigError, match="revision 'main'"):
        open_checkpoint(models_by_tie[True], revision="main")
    with pytest.raises(ConfigError, match="tokenizer"):
        open_checkpoint(saved / "one", tokenizer=object())


def test_home_is_expanded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved))
    assert open_checkpoint("~/one").names() == open_checkpoint(saved / "one").names()


# The hub


@dataclasses.dataclass
class FakeHub:
    """Stands for `snapshot_download`: copies what the patterns allow, into `.../<commit>`."""

    remote: Path
    cache: Path
    calls: list[tuple[str, str | None, bool]] = dataclasses.field(default_factory=list)

    def __call__(
        self, repo: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str]
    ) -> str:
        self.calls.append((repo, revision, local_files_only))
        folder = self.cache / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.remote.iterdir():
            if path.name in allow_patterns:
                shutil.copyfile(path, folder / path.name)
        return str(folder)


@pytest.fixture
def hub(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(one, tmp_path / "snapshots")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


@pytest.mark.parametrize("layout", ["one", "shards"])
def test_hub_fetches_what_is_read(hub: FakeHub, saved: Path, shards: Path, layout: str) -> None:
    hub.remote = hub.remote if layout == "one" else shards
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_llama.py"):
        (hub.remote / name).write_bytes(b"never fetched")
    checkpoint = open_checkpoint("org/name", revision="v1", local_files_only=True)
    assert hub.calls == [("org/name", "v1", True), ("org/name", COMMIT, True)]
    assert checkpoint.source == Source("hub", "org/name", COMMIT)
    assert checkpoint.sha256() == open_checkpoint(saved / "one").sha256()
    assert "tokenizer.json" in checkpoint.tokenizer_files
    fetched = {path.name for path in (hub.cache / COMMIT).iterdir()}
    assert not fetched & {"consolidated.safetensors", "pytorch_model.bin", "modeling_llama.py"}


def test_hub_refuses_before_the_weights_are_fetched(hub: FakeHub) -> None:
    edit_json(hub.remote / "config.json", lambda value: value.update(quantization_config={"a": 1}))
    with pytest.raises(UnsupportedError, match="quantization_config"):
        open_checkpoint("org/name")
    assert hub.calls == [("org/name", None, False)]
    assert not (hub.cache / COMMIT / "model.safetensors").exists()


def test_hub_without_config(hub: FakeHub) -> None:
    (hub.remote / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'org/name' has no config.json.*FILE.gguf"):
        open_checkpoint("org/name")


def test_hub_with_an_adapter_beside_a_whole_model(hub: FakeHub) -> None:
    (hub.remote / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UnsupportedError, match=r"adapter for 'org/base' and a whole.*hf download"):
        open_checkpoint("org/name")


def test_hub_without_safetensors(hub: FakeHub) -> None:
    (hub.remote / "model.safetensors").rename(hub.remote / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle, which is never loaded"):
        open_checkpoint("org/name")


def test_folder_wins_over_a_hub_id(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hub.remote, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").source.kind == "folder"
    assert hub.calls == []


def http_error(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error\nsecond line")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub_errors.GatedRepoError), r"'org/name' is gated\. Accept its terms"),
        (http_error(hub_errors.RepositoryNotFoundError), "neither a folder here nor a model"),
        (http_error(hub_errors.RevisionNotFoundError), "'org/name' has no revision 'v1'"),
        (http_error(hub_errors.HfHubHTTPError), "HfHubHTTPError: 401 Client Error.*Try again"),
        (hub_errors.LocalEntryNotFoundError("no snapshot"), "not complete in the local cache"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("refused"), "hub cannot be reached.*give a folder"),
        (TimeoutError(), r"hub cannot be reached \(TimeoutError\)"),
        (hub_errors.HFValidationError("too long"), "not a valid hub id: too long"),
        (OSError(28, "No space left on device"), "No space left on device.*Try again"),
        (RuntimeError("transfer library"), "RuntimeError: transfer library"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("org/name", revision="v1")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    assert isinstance(caught.value, LlmCoreMLError)


def test_offline_with_the_real_client(saved: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--cached"
    shutil.copytree(saved / "shards", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    code = (
        "import sys\n"
        "from llm_coreml.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint('org/cached')\n"
        "print(checkpoint.source.revision, checkpoint.sha256())\n"
        "try:\n    open_checkpoint('org/absent')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "print('transformers' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": root},
        check=True,
    )
    opened, absent, transformers_loaded = done.stdout.splitlines()
    assert opened == f"{COMMIT} {open_checkpoint(saved / 'one').sha256()}"
    assert "CheckpointError 'org/absent' is not complete in the local cache" in absent
    assert transformers_loaded == "False"
