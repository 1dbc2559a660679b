"""An adapter's products as they are, beside the weights that they are not merged into.

base, products = products_apart(checkpoint, stored)
down, up = products["layers.0.self_attn.q_proj"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from llm_coreml.checkpoint.adapters import MergedCheckpoint, Product
from llm_coreml.checkpoint.checkpoint import Checkpoint
from llm_coreml.checkpoint.value_maps import RowChoice
from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.errors import UnsupportedError

Factors = tuple[torch.Tensor, torch.Tensor]


def products_apart(
    checkpoint: Checkpoint, stored: Mapping[str, Stored]
) -> tuple[MergedCheckpoint, dict[str, Factors]]:
    """Take the products of matrices of blocks out of a checkpoint, as far as they can be.

    Args:
        checkpoint: With an adapter from files.
        stored: What each parameter of the decoder is made of.

    Returns:
        The checkpoint with what is left of its adapter, and fp32 `[rank, inputs]` and
        `[outputs, rank]` by the name of the matrix in the decoder.

    Raises:
        UnsupportedError: its adapter is not one of files.
    """
    if not isinstance(checkpoint, MergedCheckpoint):
        raise UnsupportedError(
            "--adapters beside needs an adapter that lies in files, beside its base or alone with "
            "the base's name; save it with save_pretrained(folder), and export the folder."
        )
    users: dict[str, list[str]] = {}
    for name, made in stored.items():
        for each in made.names:
            users.setdefault(each, []).append(name)
    taken = {
        each: product
        for each, product in checkpoint.products.items()
        if not product.table
        and product.magnitude is None
        and all(_can_be_apart(name, stored[name]) for name in users.get(each, []))
    }
    found = {
        name.removesuffix(".weight"): _factors(taken[made.names[0]], made)
        for name, made in stored.items()
        if made.names and made.names[0] in taken
    }
    left = {name: each for name, each in checkpoint.products.items() if name not in taken}
    return replace(checkpoint, products=left), found


def _can_be_apart(name: str, made: Stored) -> bool:
    plain = made.values is None or isinstance(made.values, RowChoice)
    return plain and len(made.names) == 1 and name.startswith("layers.")


def _factors(product: Product, made: Stored) -> Factors:
    down, up = product.down.read().float(), product.up.read().float() * product.scale
    return down, up if made.values is None else made.values.values([up])
