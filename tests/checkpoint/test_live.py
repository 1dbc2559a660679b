"""Live models as training leaves them, against what is merged, saved and opened again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import llm_coreml
from caller_state import state_of
from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, randomize, save, tokens_for
from warned import OF_PEFT

pytestmark = OF_PEFT

TOKENS = tokens_for(97, 24)
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}

Wrap = Callable[[Any], Any]


def trained(model: Any, config: Any, seed: int = 2, name: str = "default") -> Any:
    """Put an adapter into `model`, and move what it trains."""
    made = peft.get_peft_model(model, config, adapter_name=name)
    return moved(made, seed)


def moved(model: Any, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw) * 0.2
                parameter.add_(noise.to(parameter.dtype))
    return model.eval()


def logits_of(source: Any) -> torch.Tensor:
    return EagerRunner(build_original(open_model(source), 64), "eager").logits(TOKENS)


def assert_saved(live: Any, merged: Any, folder: Path) -> None:
    """Hold a live model against another that is saved and opened again, bit by bit."""
    found, wanted = open_model(live), open_model(save(merged, folder))
    assert found.spec == wanted.spec
    for name in wanted.checkpoint.names():
        assert torch.equal(
            found.checkpoint.tensor(name, torch.float32),
            wanted.checkpoint.tensor(name, torch.float32),
        ), name
    stored = (found.checkpoint, wanted.checkpoint)
    types = [[each.dtype(name) for name in sorted(wanted.checkpoint.names())] for each in stored]
    if types[0] == types[1]:
        assert found.sha256() == wanted.sha256()


# Adapters


KINDS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(**LORA),
    "rsLoRA": peft.LoraConfig(**{**LORA, "target_modules": "all-linear"}, use_rslora=True),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "patterns": peft.LoraConfig(**LORA, rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 3}),
    "PiSSA": peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "whole modules": peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices=[3, 5]),
    "LoHa": peft.LoHaConfig(**LORA),
    "LoKr": peft.LoKrConfig(**LORA),
    "VeRA": peft.VeraConfig(**{**LORA, "target_modules": ["q_proj"]}),
    "OFT": peft.OFTConfig(**LORA, oft_block_size=16),
    "IA3": peft.IA3Config(**LORA, feedforward_modules=["down_proj"]),
    "AdaLoRA": peft.AdaLoraConfig(**LORA, total_step=10),
    "FourierFT": peft.FourierFTConfig(**LORA, n_frequency=10),
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(kind: str, tied: bool, tmp_path: Path) -> None:
    live = trained(llama(tie_word_embeddings=tied), copy.deepcopy(KINDS[kind]))
    before = expected_logits(live, TOKENS)
    assert (before - expected_logits(llama(tie_word_embeddings=tied), TOKENS)).abs().max() > 0.1
    merged = copy.deepcopy(live).merge_and_unload()
    assert_saved(live, merged, tmp_path / "m")
    assert torch.equal(expected_logits(live, TOKENS), before)
    wanted = expected_logits(merged, TOKENS)
    assert (logits_of(live) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


def test_of_a_tied_pair_one_is_adapted_as_the_model_runs() -> None:
    """PEFT merges into the shared bytes, so that both change; trained was one of them."""
    config = peft.LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]})
    live = trained(llama(tie_word_embeddings=True), config)
    assert (logits_of(live) - expected_logits(live, TOKENS)).abs().max() < 1e-4
    assert "lm_head.weight" in open_checkpoint(live).names()


def test_an_adapter_is_merged_in_fp32_whatever_the_model_is_in(tmp_path: Path) -> None:
    live = trained(llama().to(torch.bfloat16), peft.LoraConfig(**LORA, use_dora=True))
    merged = copy.deepcopy(live).float().merge_and_unload()
    assert_saved(live, merged, tmp_path / "m")
    # Opened again, since a model's rotary table stays what bf16 has made of it.
    wanted = expected_logits(type(merged).from_pretrained(tmp_path / "m"), TOKENS)
    assert (logits_of(live) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


def two_adapters() -> Any:
    live = trained(llama(), peft.LoraConfig(**LORA), name="first")
    live.add_adapter("second", peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, r=5))
    live.set_adapter("second")
    moved(live, 3)
    return live


def weighted(live: Any) -> None:
    live.add_weighted_adapter(["first", "second"], [0.7, -0.2], "mixed", combination_type="cat")
    live.set_adapter("mixed")


def rescaled(live: Any) -> None:
    for module in live.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("second", 0.25)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda live: live.set_adapter("first"), "'first'"),
        (lambda live: live.set_adapter("second"), "'second'"),
        (lambda live: live.base_model.set_adapter(["first", "second"]), "'first', 'second'"),
        (weighted, "'mixed'"),
        (rescaled, "'second'"),
        (lambda live: live.merge_adapter(), None),
        (lambda live: live.base_model.disable_adapter_layers(), None),
    ],
)
def test_what_is_active_is_merged(change: Wrap, told: str | None, tmp_path: Path) -> None:
    live = two_adapters()
    change(live)
    wanted = expected_logits(live, TOKENS)
    assert (logits_of(live) - wanted).abs().max() < 1e-4
    notes = " ".join(open_model(live).notes)
    assert (f"PEFT ({told}) merged into" in notes) if told else ("PEFT" not in notes)


@pytest.mark.parametrize(
    "inside",
    [
        lambda live: live.base_model,
        lambda live: live.base_model.model,
        lambda live: live.get_base_model(),
    ],
)
def test_the_model_inside_of_a_peft_model_has_its_adapters(inside: Wrap, tmp_path: Path) -> None:
    live = trained(llama(), peft.LoraConfig(**LORA))
    assert_saved(inside(live), copy.deepcopy(live).merge_and_unload(), tmp_path / "m")


def test_nothing_is_copied_but_the_layer_that_is_read() -> None:
    live = trained(llama(), peft.LoraConfig(**LORA))
    opened, own = open_checkpoint(live), dict(live.named_parameters())
    for name in opened.names():
        plain = own.get(f"base_model.model.{name}")
        if plain is not None:
            assert opened.stored(name).data_ptr() == plain.data_ptr()
    adapted = opened.names() - {name.removeprefix("base_model.model.") for name in own}
    assert len(adapted) == 2
    for name in adapted:
        made = weakref.ref(opened.stored(name))
        assert made() is None, "a merged matrix is held by nobody"


def test_an_adapter_that_was_put_into_a_plain_model(tmp_path: Path) -> None:
    live, config = llama().requires_grad_(False), peft.LoraConfig(**LORA)
    peft.inject_adapter_in_model(copy.deepcopy(config), live)
    other = peft.get_peft_model(llama(), config)
    other.base_model.model.load_state_dict(moved(live, 2).state_dict())
    assert_saved(live, other.merge_and_unload(), tmp_path / "m")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (
            peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
            "ADAPTION_PROMPT",
        ),
    ],
)
def test_what_no_weights_can_say_is_refused(config: Any, told: str) -> None:
    with pytest.raises(UnsupportedError, match=f"of kind {told}, which cannot be merged"):
        open_checkpoint(peft.get_peft_model(llama(), config))


def test_an_adapter_of_another_rank_than_its_layer_is_refused() -> None:
    live = trained(llama(), peft.LoraConfig(**LORA))
    layer = live.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(torch.ones(3, 64))
    with pytest.raises(UnsupportedError, match="PEFT cannot merge the adapter of a Linear"):
        logits_of(live)


# Wrappers


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def layers_of(model: Any) -> Any:
    return next(each for name, each in model.named_modules() if name.endswith("model.layers"))


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layer_by_layer(model: Any) -> Any:
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    return model


def in_place(model: Any) -> Any:
    model.compile()
    return model


def with_a_value_head(model: Any) -> Any:
    outer = torch.nn.Module()
    outer.pretrained_model, outer.v_head = model, torch.nn.Linear(64, 1)
    return outer


WRAPPERS: dict[str, Wrap] = {
    "compiled": torch.compile,
    "compiled in place": in_place,
    "layers compiled": layer_by_layer,
    "DataParallel": torch.nn.DataParallel,
    "DDP": lambda model: torch.nn.parallel.DistributedDataParallel(model),
    "compiled DDP": lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model)),
    "FSDP2": sharded,
    "TRL": with_a_value_head,
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_read_through(wrapper: str, adapted: bool, tmp_path: Path) -> None:
    live = llama(tie_word_embeddings=True)
    live = trained(live, peft.LoraConfig(**LORA)) if adapted else live
    merged = copy.deepcopy(live).merge_and_unload() if adapted else copy.deepcopy(live)
    assert_saved(WRAPPERS[wrapper](live), merged, tmp_path / "m")


def test_a_model_that_is_sharded_over_processes_is_refused() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(UnsupportedError, match=r"over 2 processes\. Gather it.*full_st"):
            open_checkpoint(sharded(llama()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_accelerate_has_offloaded_is_read(
    to_disk: bool, adapted: bool, tmp_path: Path
) -> None:
    from accelerate import cpu_offload, disk_offload

    live = llama(tie_word_embeddings=True)
    live = trained(live, peft.LoraConfig(**LORA)) if adapted else live
    merged = copy.deepcopy(live).merge_and_unload() if adapted else copy.deepcopy(live)
    if to_disk:
        disk_offload(live, str(tmp_path / "offloaded"), torch.device("cpu"))
    else:
        cpu_offload(live, torch.device("cpu"))
    weight = next(each for name, each in live.named_parameters() if "up_proj" in name)
    assert weight.is_meta
    assert_saved(live, merged, tmp_path / "m")
    assert weight.is_meta
    assert any("accelerate has offloaded" in note for note in open_model(live).notes)


def test_a_model_without_data_is_refused() -> None:
    live = trained(llama(), peft.LoraConfig(**LORA)).to("meta")
    with pytest.raises(CheckpointError, match=r"is on the meta device, without data"):
        open_checkpoint(live)


def test_a_table_that_was_resized(tmp_path: Path) -> None:
    live = llama(tie_word_embeddings=True)
    live.resize_token_embeddings(104)
    assert_saved(live, live, tmp_path / "m")
    assert open_model(live).spec.vocab_size == 104


# bitsandbytes


def quantized(bits: int) -> Any:
    """Return the tiny model with matrices of bitsandbytes, as from_pretrained would load it."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has wheels for Linux alone")

    live = llama(intermediate_size=128)
    for name, module in list(live.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            sizes = module.in_features, module.out_features
            if bits == 4:
                made = bnb.nn.Linear4bit(*sizes, False, torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4"
                )
            else:
                made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(
                    module.weight.data, requires_grad=False, has_fp16_weights=False
                )
            parent, _, last = name.rpartition(".")
            setattr(live.get_submodule(parent), last, made.to("cpu"))
    live.config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    live.is_loaded_in_4bit, live.is_loaded_in_8bit = bits == 4, bits == 8
    return live


MATRICES = ("layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_codes_of_bitsandbytes_are_read_as_values(bits: int, dora: bool, adapted: bool) -> None:
    live = quantized(bits)
    if adapted:
        live = trained(live, peft.LoraConfig(**LORA, use_dora=dora))
    notes = open_model(live).notes
    assert any("7 matrices of bitsandbytes are read as the values" in note for note in notes)
    weights = {name: open_model(live).weights.tensor(name, torch.float32) for name in MATRICES}
    wanted = expected_logits(live, TOKENS)
    # Both round what they multiply with as well: 8 bits what is read, a CPU's kernel of 4 bits all.
    # PEFT takes the norms of DoRA from codes that the kernel has put into another order.
    if not (dora and bits == 4):
        assert (logits_of(live) - wanted).abs().max() < 0.1 * wanted.abs().max()
    for name, values in weights.items():
        if not adapted:
            exact = llama(intermediate_size=128).state_dict()[f"model.{name}"]
            step = exact.abs().max() * (0.55 / 127 if bits == 8 else 0.16)
            assert 0 < (values - exact).abs().max() <= step
        # A model that has run holds its codes in another order and its scales elsewhere.
        again = open_model(live).weights.tensor(name, torch.float32)
        assert (again - values).abs().max() <= 2**-8 * values.abs().max()
        assert (again - values).abs().max() == 0 or bits == 4


# The caller's state


def test_the_caller_and_the_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One export of a fine-tune in the midst of its training, and one of its merged folder."""
    live = llama(tie_word_embeddings=True, intermediate_size=96)
    live = trained(live, peft.LoraConfig(**LORA, lora_dropout=0.1))
    settings = llm_coreml.ExportConfig(context=64, seq_lengths=(1,))
    folder = save(copy.deepcopy(live).merge_and_unload(), tmp_path / "merged")
    # What is loaded first brings loggers of its own.
    wanted = llm_coreml.export(folder, output=tmp_path / "wanted", bits=4, config=settings)
    live.train()
    live(torch.tensor([TOKENS]), labels=torch.tensor([TOKENS])).loss.backward()
    live.register_forward_hook(lambda *_: None)
    layer = live.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: pytest.fail("an export runs no module of the caller's"))
    before = state_of(live)
    capfd.readouterr()
    found = llm_coreml.export(
        torch.compile(live), output=tmp_path / "found", bits=4, config=settings
    )
    assert capfd.readouterr() == ("", "")
    after = state_of(live)
    for key, value in before.items():
        assert after[key] == value, key
    assert found.program.read_bytes() == wanted.program.read_bytes()
    assert found.manifest.source.sha256 == wanted.manifest.source.sha256


def test_exports_in_threads_leave_the_caller_as_it_was(tmp_path: Path) -> None:
    settings = llm_coreml.ExportConfig(context=64, seq_lengths=(1,))
    models = [randomize(llama(intermediate_size=96), seed) for seed in (0, 1)]
    before = [state_of(model) for model in models]

    def export(name: str, model: Any) -> bytes:
        made = llm_coreml.export(model, output=tmp_path / name, bits=4, config=settings)
        return made.program.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(export, ("first", "second"), models))
    after = [state_of(model) for model in models]
    for found, wanted in zip(after, before, strict=True):
        for key in wanted:
            assert found[key] == wanted[key], key
    assert made == [export(f"{at} alone", model) for at, model in enumerate(models)]
    assert made[0] != made[1]
