"""What a fine-tune changes of a base, as a folder: small, run, and the very bytes once applied."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import lzma
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_coreml
from exported import files_of, in_process, save_model
from llm_coreml.artifact.mapped import map_folder
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.bundle.seal import checksum
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.delta import making
from llm_coreml.delta.delta_record import CHANGES, RECORD
from llm_coreml.delta.parts import Part, build, changes, compare, merged
from llm_coreml.delta.places import Place, places
from llm_coreml.errors import (
    ArtifactError,
    ConfigError,
    GateError,
    OutputError,
    UnmeasuredError,
)
from llm_coreml.eval.originals import originals
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.formats.stored import stored_matrices
from llm_coreml.quantize.quantized import quantize
from llm_coreml.runtime.eager import EagerRunner
from shared import Shared
from tiny import expected_logits, tokens_for

SETTINGS = ExportConfig(context=64, seq_lengths=(1, 8), bits=4, adapters="beside")
RANK, TARGETS = 2, {"self_attn.q_proj": (32, 32), "mlp.down_proj": (64, 32)}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: bytes(content) for name, content in map_folder(folder).items()}


@pytest.fixture(scope="session")
def adapter(shared: Shared, checkpoint: Path) -> Path:
    """A LoRA of the tiny model, of two of its matrices, as PEFT saves it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        draw = torch.Generator().manual_seed(1)
        tensors, front = {}, "base_model.model.model.layers.0"
        for name, (inputs, outputs) in TARGETS.items():
            for kind, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                value = 0.3 * torch.randn(shape, generator=draw)
                tensors[f"{front}.{name}.lora_{kind}.weight"] = value
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 3},
            **{"base_model_name_or_path": str(checkpoint), "bias": "none"},
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return shared.file("tiny-lora", [checkpoint], make)


@pytest.fixture(scope="session")
def tuned(shared: Shared, adapter: Path) -> Path:
    """The export of base and adapter, otherwise with the settings of `bundle`."""

    def make(path: Path) -> None:
        llm_coreml.export(adapter, output=path, config=SETTINGS, cache=False)

    return shared.file("tuned-bundle", [adapter, SETTINGS], make)


@pytest.fixture(scope="session")
def delta(tmp_path_factory: pytest.TempPathFactory, bundle: Path, tuned: Path) -> Path:
    folder = tmp_path_factory.mktemp("delta") / "delta"
    llm_coreml.make_delta(bundle, tuned, output=folder, tokens=32)
    return folder


def test_base_and_delta_are_the_full_export(
    bundle: Path,
    tuned: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("delta", bundle, tuned, "-o", tmp_path / "d", "--tokens", "16", "--format", "json")
    done = in_process(capfd, monkeypatch, *words, "--max-kl", "0")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    sizes = {name: len(content) for name, content in contents(tmp_path / "d").items()}
    assert set(sizes) == {RECORD, CHANGES} and told["bytes"] == sum(sizes.values())
    assert told["full_bytes"] == sum(len(content) for content in contents(tuned).values())
    measured = told["measured"]
    assert (measured["mean_kl"], measured["top1_agreement"]) == (0.0, 1.0)
    assert measured["base_mean_kl"] > 1e-4 and measured["tokens"] == 16
    done = in_process(capfd, monkeypatch, "apply", bundle, tmp_path / "d", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert contents(tmp_path / "out") == contents(tuned)
    assert "as the delta told" in done.out


def test_an_adapter_beside_leaves_the_codes_to_the_base(bundle: Path, tuned: Path) -> None:
    base, found = (open_bundle(each).manifest for each in (bundle, tuned))
    extra = sum(RANK * 16 * (inputs + outputs) // 8 for inputs, outputs in TARGETS.values())
    stored, before = found.quantization.linear, base.quantization.linear
    assert stored.bytes == before.bytes + extra
    assert stored.label == f"{before.label} + fp16 products of rank {RANK} beside it"
    weights = 8 * before.bytes / before.bits_per_weight
    assert stored.bits_per_weight == pytest.approx(8 * stored.bytes / weights)
    assert found.verification.conversion is not None
    more = found.verification.conversion.weights - base.verification.conversion.weights
    assert more == 2 * len(TARGETS)  # the factors are in the program, bit by bit
    codes, held = weights_of(bundle), weights_of(tuned)
    assert len(codes) > 10 and set(codes) <= set(held)


def weights_of(folder: Path) -> list[bytes]:
    """Return the weights that a program holds, packed as they are."""
    program = (folder / "model.pte").read_bytes()
    found = places(folder / "model.pte")
    return [program[place.start : place.stop] for place in found if place.weights]


def test_the_program_of_base_and_adapter_is_the_merged_model(
    adapter: Path, tuned: Path, live_model: Any
) -> None:
    """In fp32 as the paper merges it; the program as near as 4 bits of the base are."""
    merged, stored = copy.deepcopy(live_model), load_file(adapter / "adapter_model.safetensors")
    for name in TARGETS:
        front = f"base_model.model.model.layers.0.{name}.lora_"
        weight = merged.get_submodule(f"model.layers.0.{name}").weight
        product = stored[f"{front}B.weight"] @ stored[f"{front}A.weight"]
        weight.data += 3 / RANK * product  # alpha over rank
    tokens = tokens_for(300, 24)
    expected = expected_logits(merged, tokens)
    model = open_model(adapter)
    plain = replace(SETTINGS, bits=None, scheme="none", embedding="none", compute_precision="fp32")
    quantized = quantize(model, resolve(plain, model.spec), Path("none"), Silent())
    decoder = quantized.decoder
    assert decoder.get_submodule("layers.0.self_attn.q_proj").get_parameter("down").shape == (2, 32)
    bound = 2e-3 * expected.abs().max()  # the factors are rounded to fp16
    assert (EagerRunner(decoder, "").logits(tokens) - expected).abs().max() < bound
    rows = open_runner(open_bundle(tuned)).logits(tokens)
    base = expected_logits(live_model, tokens)
    assert kl_divergence(expected, rows).mean() < kl_divergence(expected, base).mean() / 4


def test_a_delta_of_an_adapter_has_no_codes(delta: Path, tuned: Path) -> None:
    record = json.loads((delta / RECORD).read_text())
    assert [part["how"] for part in record["files"]["tokenizer.json"]["parts"]] == ["copy"]
    program = record["files"]["model.pte"]["parts"]
    copied = sum(part["bytes"] for part in program if part["how"] == "copy")
    assert copied > 0.9 * sum(map(len, weights_of(tuned)))
    sizes = [sum(map(len, contents(folder).values())) for folder in (delta, tuned)]
    assert sizes[0] < sizes[1] / 3


def test_a_model_is_exported_as_the_base_was(
    bundle: Path,
    adapter: Path,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def export(
        model: Path, tokenizer: None, *, output: Path, config: ExportConfig, **_: Any
    ) -> Any:
        assert (model, tokenizer) == (adapter, None)
        before = ExportConfig.from_json(open_bundle(bundle).manifest.config)
        assert config == replace(before, adapters="beside")
        return open_bundle(shutil.copytree(tuned, output))  # what such an export writes

    monkeypatch.setattr(making, "export", export)
    given: dict[str, Any] = {"tokens": 8, "adapters": "beside"}
    with pytest.raises(GateError, match=r"PyTorch eager fp32 is .* asks for 0.00000 at most"):
        llm_coreml.make_delta(bundle, adapter, output=tmp_path / "d", max_kl=0.0, **given)
    assert files_of(tmp_path) == set()
    found = llm_coreml.make_delta(bundle, adapter, output=tmp_path / "d", **given)
    assert found.measured is not None and found.measured.base_mean_kl is not None
    assert found.measured.mean_kl is not None
    assert 0 < found.measured.mean_kl < found.measured.base_mean_kl
    llm_coreml.apply_delta(bundle, tmp_path / "d", output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tuned)


def test_what_cannot_be_exported_again_is_told_before(
    bundle: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], told: str, tuned: Path, **given: Any) -> None:
        with pytest.raises(error, match=told):
            llm_coreml.make_delta(bundle, tuned, output=tmp_path / "d", **given)
        assert files_of(tmp_path) == set()

    refused(ConfigError, "is for a model that is exported", bundle, adapters="beside")
    base = open_bundle(bundle)

    def exported_with(**settings: Any) -> None:
        config = replace(ExportConfig.from_json(base.manifest.config), **settings)
        written = json.loads(json.dumps(config.to_json()))
        found = replace(base, manifest=replace(base.manifest, config=written))
        monkeypatch.setattr(making, "open_bundle", lambda _: found)

    exported_with(calibrate="mine.txt")
    refused(ConfigError, "--calibrate mine.txt, a file of which it holds no more", adapter)
    exported_with(head="topk:2")
    refused(UnmeasuredError, "leave it out, or export with --head logits", adapter, max_kl=0.1)


@pytest.fixture(scope="session")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, live_model: Any) -> Path:
    """The tiny model with rows and gains that training made larger and smaller."""
    model, draw = copy.deepcopy(live_model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1 + 0.2 * torch.randn(len(value), *[1] * (value.dim() - 1), generator=draw))
    return save_model(tmp_path_factory.mktemp("fine") / "tune", model)


def codes_of(folder: Path) -> list[bytes]:
    """Return the codes of a program's matrices, in the order of their use."""
    found = [each.codes.value() for each in stored_matrices(folder / "model.pte")]
    return [value.tobytes() for value in found if isinstance(value, np.ndarray)]


def test_codes_of_the_base_are_kept(
    bundle: Path,
    fine_tune: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("delta", bundle, fine_tune, "-o", tmp_path / "d", "--tokens", "16", "--keep-codes")
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["measured"]["mean_kl"] < told["measured"]["base_mean_kl"] / 4
    llm_coreml.apply_delta(bundle, tmp_path / "d", output=tmp_path / "out")
    made, base = (open_bundle(each).manifest for each in (tmp_path / "out", bundle))
    codes = codes_of(bundle)
    assert len(codes) == 8 and codes_of(tmp_path / "out") == codes
    # All that differs in the program: scales and norms, and the hash that its data is found by.
    assert told["new"] == 0 and told["changed"] + told["copied"] == made.program.bytes
    held = weights_of(tmp_path / "out")
    other = sum(len(each) for each in weights_of(bundle) if each not in held)
    assert 0 < other <= told["changed"] < other + 256
    assert made.quantization.codes_of == base.program.sha256
    assert base.quantization.codes_of is None
    assert made.config["weights"]["codes_of"] == bundle.name
    # An evaluation finds the same quantized model again, with the base at hand.
    shutil.copytree(bundle, tmp_path / bundle.name, dirs_exist_ok=True)
    tokens = tokens_for(300, 8)
    judge = originals(open_bundle(tmp_path / "out"), fine_tune, Silent())["quantized"]
    rows = open_runner(open_bundle(tmp_path / "out")).logits(tokens)
    assert (judge.logits(tokens) - rows).abs().max() < 1e-2 * rows.abs().max()
    shutil.rmtree(tmp_path / bundle.name)
    assert "quantized" not in originals(open_bundle(tmp_path / "out"), fine_tune, Silent())


def test_codes_are_kept_of_a_model_alone(bundle: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep-codes is for a model that is exported"):
        llm_coreml.make_delta(bundle, tuned, output=tmp_path / "d", keep_codes=True)
    assert files_of(tmp_path) == set()


def test_weights_have_places_of_their_own(bundle: Path) -> None:
    program = bundle / "model.pte"
    found = places(program)
    assert found[0].start == 0 and found[-1].stop == program.stat().st_size
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    # Codes of int4 `[64, 32]` and their scales `[64, 1]`, of the feed-forward layer.
    weights = [place.stop - place.start for place in found if place.weights]
    assert weights.count(64 * 32 // 2) >= 2 and weights.count(2 * 64) >= 2


def test_parts_build_what_they_were_made_of() -> None:
    base, other = b"aaaabbbbccccdddd", b"aaaaBbbbcccceeeeeedddd"
    of_base = [Place(at, at + 4, True) for at in range(0, 16, 4)]
    of_other = [Place(a, b, True) for a, b in ((0, 4), (4, 8), (8, 12), (12, 18), (18, 22))]
    found = compare(memoryview(base), of_base, memoryview(other), of_other)
    assert found == [
        *(Part("copy", 4, 0), Part("change", 4, 4), Part("copy", 4, 8)),
        *(Part("new", 6), Part("copy", 4, 12)),
    ]
    kept = b"".join(changes(memoryview(base), memoryview(other), found))
    assert kept == bytes([ord("B") ^ ord("b"), 0, 0, 0]) + b"eeeeee"
    pieces = iter(kept)
    built = build(memoryview(base), found, lambda n: bytes(next(pieces) for _ in range(n)))
    assert b"".join(built) == other
    assert merged([Part("copy", 4, 0), Part("copy", 4, 4), Part("copy", 4, 0)]) == (
        Part("copy", 8, 0),
        Part("copy", 4, 0),
    )


# What is refused

Record = dict[str, Any]


def _program(record: Record) -> Record:
    found: Record = record["files"]["model.pte"]
    return found


def _beyond(record: Record) -> None:
    part = next(part for part in _program(record)["parts"] if part["how"] == "copy")
    part["start"] = 1 << 40


def _endless(record: Record) -> None:
    _program(record)["parts"] = [{"how": "change", "bytes": 1 << 50, "start": 0}]
    _program(record)["bytes"] = 1 << 50


def _card(record: Record) -> None:
    for part in record["files"]["README.md"]["parts"]:
        part["how"] = "copy"


def _more(record: Record) -> None:
    record["files"]["run.sh"] = {**record["files"]["tokenizer.json"]}


def _renamed(name: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        record["files"][name] = record["files"].pop("tokenizer.json")

    return change


def _set(*path: Any) -> Callable[[Record], None]:
    *places, key, value = path

    def change(record: Record) -> None:
        inner: Any = record
        for place in places:
            inner = inner[place]
        inner[key] = value

    return change


HOSTILE: dict[str, tuple[Callable[[Record], None], str]] = {
    "another base": (_set("base", "0" * 64), "belongs to a program whose SHA-256"),
    "beyond the base": (_beyond, "takes bytes up to"),
    "endless": (_endless, "no export does"),
    "another hash": (_set("files", "model.pte", "sha256", "0" * 64), "than was told"),
    "parts do not add up": (_set("files", "model.pte", "bytes", 3), "do not add up"),
    "card of the base": (_card, "nobody vouches for"),
    "one file more": (_more, "nobody vouches for"),
    "leaves the folder": (_renamed("../../evil"), "is damaged"),
    "absolute": (_renamed("/tmp/evil"), "is damaged"),
    "hidden": (_renamed(".bashrc"), "is damaged"),
    "negative": (_set("changes", "bytes", -1), "is damaged"),
    "another version": (_set("version", 2), "is damaged"),
    "unknown key": (_set("more", 1), "is damaged"),
    "no manifest": (lambda record: record["files"].pop("manifest.json"), "delta"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_end_in_a_sentence(
    name: str, bundle: Path, delta: Path, tmp_path: Path
) -> None:
    change, told = HOSTILE[name]
    folder = shutil.copytree(delta, tmp_path / "delta")
    record = json.loads((folder / RECORD).read_text())
    change(record)
    record["checksum"] = checksum(record)  # so that nothing but its content refuses it
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=told):
        llm_coreml.apply_delta(bundle, folder, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"delta"}


def test_damaged_files_are_found(bundle: Path, tuned: Path, delta: Path, tmp_path: Path) -> None:
    def refused(told: str, base: Path = bundle) -> None:
        with pytest.raises(ArtifactError, match=told):
            llm_coreml.apply_delta(base, folder, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    folder = shutil.copytree(delta, tmp_path / "delta")
    refused("belongs to a program", base=tuned)
    kept = (delta / CHANGES).read_bytes()
    (folder / CHANGES).write_bytes(kept[:-1])
    refused("bytes, not")
    (folder / CHANGES).write_bytes(kept[:100] + bytes([kept[100] ^ 1]) + kept[101:])
    refused("SHA-256 is another's")
    record = json.loads((delta / RECORD).read_text())
    plain = lzma.decompress(kept)
    for changed, told in (
        (kept[:100] + bytes([kept[100] ^ 1]) + kept[101:], "cannot be unpacked|than was told"),
        (kept[:-40], "is cut"),
        (kept + b"x", "does not end as it should"),
        (lzma.compress(plain + b"x"), "holds more than its parts"),
        (lzma.compress(plain[:-1]), "holds less than its parts"),
        (lzma.compress(bytes([plain[0] ^ 1]) + plain[1:]), "than was told"),
    ):
        (folder / CHANGES).write_bytes(changed)
        record["changes"] = {
            "bytes": len(changed),
            "sha256": hashlib.sha256(changed).hexdigest(),
        }
        (folder / RECORD).write_text(json.dumps({**record, "checksum": checksum(record)}))
        refused(told)
    (folder / RECORD).write_text((delta / RECORD).read_text().replace('"new"', '"change"', 1))
    refused("checksum is another's")
    (folder / CHANGES).unlink()
    refused("is damaged|is missing")
    (folder / RECORD).unlink()
    refused("holds no delta.json")


def test_an_edited_base_makes_nothing(bundle: Path, delta: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bundle, tmp_path / "base")
    (base / "README.md").write_text("Mine.")  # anybody may edit the card
    llm_coreml.apply_delta(base, delta, output=tmp_path / "out")
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not the file that its manifest describes"):
        llm_coreml.apply_delta(base, delta, output=tmp_path / "again")


def test_what_is_there_is_left_alone(
    bundle: Path, tuned: Path, delta: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"exists already|--overwrite leaves"):
            llm_coreml.make_delta(bundle, tuned, output=out, overwrite=overwrite)
        with pytest.raises(OutputError, match=r"exists already|--overwrite leaves"):
            llm_coreml.apply_delta(bundle, delta, output=out, overwrite=overwrite)
    assert files_of(tmp_path) == {"out", "out/mine.txt"}
