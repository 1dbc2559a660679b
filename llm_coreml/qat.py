"""Quantization-aware training by torchao's own configurations, of formats that Core ML holds.

    qat = qat_config("int4-group", group_size=32)
    quantize_(model, qat.prepare, qat.filter)            # before training
    quantize_(model, qat.convert, qat.filter)            # after it, or not at all
    llm_coreml.export(model, tokenizer, output="out")    # the same numbers, bit by bit

Scales are fp16 from the beginning, since Core ML's are: torchao's usual ones have the type of the
training, and rounding them afterwards would export another model than the one that was trained.
torchao has no training with codebooks: `codebook:3` is `codebook_qat`, used in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from llm_coreml.codebook_qat import CodebookQATConfig
from llm_coreml.config.scheme_text import read_format
from llm_coreml.errors import ConfigError, nearest
from llm_coreml.quantize.formats.schemes import CODEBOOK_BITS, Codebook

_DTYPES: dict[str, torch.dtype] = {
    "int4": torch.int4,  # type: ignore[attr-defined]
    "int8": torch.int8,
}
_NAMES = ("int4-group", "int4-channel", "int8-group", "int8-channel")
_CODEBOOK, _ROWS = "codebook", 16


@dataclass(frozen=True)
class QatConfig:
    """What `torchao.quantization.quantize_` is given before training and after it.

    Attributes:
        scheme: The format, as `--scheme` names it.
        prepare: Puts linear layers whose weights are rounded as they are used into a model.
        convert: Replaces them by linear layers of the codes; of codebooks, gives them the rounded
            weights, which the tables stay beside.
        filter: Chooses the layers: linear ones, without the head.
    """

    scheme: str
    prepare: AOBaseConfig
    convert: AOBaseConfig
    filter: Callable[[torch.nn.Module, str], bool]


def qat_config(scheme: str, group_size: int = 32) -> QatConfig:
    """Return torchao's configurations for training what is exported bit by bit.

    Args:
        scheme: `int4-group`, `int4-channel`, `int8-group`, `int8-channel`, or a codebook as
            `--scheme` writes it: `codebook:3`, `codebook:2:rows8`, `codebook:4:whole`.
        group_size: Inputs that share a scale, where there are groups.

    Raises:
        ConfigError: no such format, or no such size.
    """
    if scheme.partition(":")[0] == _CODEBOOK:
        return _codebook(scheme)
    if scheme not in _NAMES:
        raise ConfigError(
            f"qat_config knows {', '.join(_NAMES)} and codebook:BITS, not '{scheme}'."
            f"{nearest(scheme, (*_NAMES, _CODEBOOK))}"
        )
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"group_size is {group_size!r}; give a whole number above 0.")
    name, _, kind = scheme.partition("-")
    dtype, grouped = _DTYPES[name], kind == "group"
    granularity = PerGroup(group_size) if grouped else PerAxis(0)
    fake = IntxFakeQuantizeConfig(
        dtype, granularity, is_symmetric=True, scale_precision=torch.float16
    )
    base = IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, scale_dtype=torch.float16
    )
    return QatConfig(
        scheme=f"{scheme}:group{group_size}" if grouped else scheme,
        prepare=QATConfig(weight_config=fake, step="prepare"),
        convert=QATConfig(base, step="convert"),
        filter=_is_trained,
    )


def _codebook(text: str) -> QatConfig:
    found = read_format(text)
    options = found.options(default_rows=_ROWS)
    if found.bits not in CODEBOOK_BITS:
        *others, last = map(str, CODEBOOK_BITS)
        raise ConfigError(
            f"qat_config is given '{text}'; a codebook has {', '.join(others)} or {last} bits, as "
            "codebook:3."
        )
    rows, columns = (_ROWS, None) if options is None else (options.rows, options.columns)
    if options is not None and (options.vector > 1 or options.scaled):
        raise ConfigError(
            f"qat_config is given '{text}'; what is trained are tables of single weights without "
            "a scale of rows: leave out vectorN and scaled."
        )
    scheme = Codebook(found.bits, rows, columns=columns)
    return QatConfig(
        scheme=text,
        prepare=CodebookQATConfig(scheme, "prepare"),
        convert=CodebookQATConfig(scheme, "convert"),
        filter=_is_trained,
    )


def _is_trained(module: torch.nn.Module, name: str) -> bool:
    """Say whether a module is a linear layer inside of the model; a tied head is its table."""
    return isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != "lm_head"
