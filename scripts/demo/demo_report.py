"""Measure a trained demo model and write its record: `training.json` and `README.md`.

The figures are those of the fp16 weights as saved, read back and computed in fp32. The
script can be run by itself on a finished folder to see the figures again.

Example:
    python scripts/demo/demo_report.py llm_coreml/demo
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from demo_baseline import Trigram
from demo_corpus import Corpus, size
from demo_evaluation import quantized, score
from demo_tokenizer import BOS_ID, EOS_ID, encode

QUANTIZED_BITS = (4, 3, 2)
GROUP = 32
POSITION_BUCKET = 128

CARD = """\
# The bundled demo model

A Llama of {parameters_m:.1f} million parameters that learned to write like Python's own
documentation. It exists so that every command of this package can be tried, tested and
measured without a network, and so that the loss from coarse weights shows. It is not an
assistant and knows nothing else.

## Figures

Perplexity is measured on `heldout.txt`, text of whole modules and reference topics that
were never trained on ({heldout_bytes:,} bytes, {heldout_tokens:,} tokens), in consecutive
windows of {context} tokens that each begin with `<|begin_of_text|>`, every other token
scored, in fp32 arithmetic.

| Weights | Perplexity | Bits per byte |
| --- | ---: | ---: |
{rows}

"RTN" is plain symmetric round-to-nearest of every linear layer in the blocks, in groups of
{group} along the input. The 3-gram model is interpolated modified Kneser-Ney, over the same
tokens and trained on the same text.

## Architecture

`LlamaForCausalLM`: {layers} layers, hidden size {hidden}, {heads} query heads over
{kv_heads} key/value heads of {head_dim} dimensions, SwiGLU of {intermediate}, RoPE over
{context} positions, tied embeddings, fp16 weights. The tokenizer is a byte-level BPE of
{vocabulary} entries; it puts `<|begin_of_text|>` ({bos}) before what it encodes, and a
document ends with `<|end_of_text|>` ({eos}).

## Training

{train_bytes:,} bytes ({train_tokens:,} tokens) for {epochs:.1f} epochs: {steps} steps of
{tokens_per_step} tokens with Muon (matrices) and AdamW (embedding, norms), seed {seed},
{minutes:.0f} minutes on {threads} CPU threads. The checkpoint kept is the one that did best
on a separate validation text (step {best_step}). `training.json` holds the full record. To
rebuild the folder:

    python scripts/demo/train_demo_model.py --output llm_coreml/demo

The text comes from the Python installation the script runs in, here {python}; another
version gives other text and so slightly other figures.

## Source and licence of the text

The Python language reference (`pydoc_data.topics`) and the docstrings of the standard
library, copyright the Python Software Foundation, under the
[PSF License Version 2](https://docs.python.org/3/license.html). `heldout.txt` and
`calibration.txt` are excerpts of that text, whole documents each, none of them in both. The
model was not trained on the first. Quantization is calibrated on the second: its first
{validation_tokens:,} tokens are the validation text, which was not trained on either, but which the
checkpoint was chosen on; the rest, some documents drawn by the seed, is text that the model was
trained on. Figures on `calibration.txt` are therefore no measure of the model.
"""


def heldout_figures(folder: Path) -> dict[str, Any]:
    """Score the saved model on the held-out text, as it is and with quantized weights."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokens = encode(tokenizer, text)
    window = model.config.max_position_embeddings
    plain = score(model, tokens, BOS_ID, window)
    return {
        "heldout_bytes": len(text.encode()),
        "heldout_tokens": plain.tokens,
        "heldout_perplexity": round(plain.perplexity, 3),
        "heldout_bits_per_byte": round(plain.nats / math.log(2) / len(text.encode()), 4),
        "heldout_loss_by_128_positions": [
            round(loss, 4) for loss in plain.mean_by_position(POSITION_BUCKET)
        ],
        "rtn_group": GROUP,
        "rtn_heldout_perplexity": {
            str(bits): round(
                score(quantized(model, bits, GROUP), tokens, BOS_ID, window).perplexity, 3
            )
            for bits in QUANTIZED_BITS
        },
    }


def trigram_perplexity(folder: Path, train_ids: Sequence[Sequence[int]]) -> float:
    """Fit the baseline on the training tokens and score it on the held-out ones."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    stream = [token for document in train_ids for token in (BOS_ID, *document, EOS_ID)]
    baseline = Trigram(stream, tokenizer.get_vocab_size())
    return baseline.perplexity(encode(tokenizer, text))


def card_rows(record: dict[str, Any]) -> str:
    """Return the lines of the card's table."""
    entries = [("fp16, as saved", record["heldout_perplexity"])]
    entries += [
        (f"RTN {bits} bits", value) for bits, value in record["rtn_heldout_perplexity"].items()
    ]
    entries.append(("3-gram model", record["trigram_heldout_perplexity"]))
    per_byte = record["heldout_tokens"] / record["heldout_bytes"]
    return "\n".join(
        f"| {label} | {value:.2f} | {math.log2(value) * per_byte:.3f} |" for label, value in entries
    )


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Fill in the model card."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {
        **record,
        "rows": card_rows(record),
        "parameters_m": record["parameters"] / 1e6,
        "group": record["rtn_group"],
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "intermediate": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "bos": BOS_ID,
        "eos": EOS_ID,
        "seed": record["recipe"]["seed"],
        "threads": record["recipe"]["threads"],
        "minutes": record["wall_seconds"] / 60,
    }
    (folder / "README.md").write_text(CARD.format_map(values), encoding="utf-8")


def write_report(
    folder: Path,
    recipe: dict[str, Any],
    progress: dict[str, Any],
    corpus: Corpus,
    train_ids: Sequence[Sequence[int]],
    validation_tokens: int,
) -> None:
    """Measure the saved model and write the record and the card."""
    model = LlamaForCausalLM.from_pretrained(folder)
    train_tokens = sum(len(document) + 2 for document in train_ids)
    tokens_per_step = recipe["batch"] * model.config.max_position_embeddings
    best = next(e for e in progress["history"] if e["step"] == progress["best_step"])
    record = {
        "python": f"CPython {platform.python_version()}",
        "parameters": model.num_parameters(),
        "train_documents": len(corpus.train),
        "train_bytes": size(corpus.train),
        "train_tokens": train_tokens,
        "validation_bytes": size(corpus.validation),
        "validation_tokens": validation_tokens,
        "heldout_documents": len(corpus.heldout),
        "steps": progress["step"],
        "best_step": progress["best_step"],
        "tokens_per_step": tokens_per_step,
        "epochs": round(progress["step"] * tokens_per_step / train_tokens, 2),
        "wall_seconds": round(progress["seconds"]),
        "train_loss": round(best["train_loss"], 4),
        "validation_loss": round(best["validation_loss"], 4),
        **heldout_figures(folder),
        "trigram_heldout_perplexity": round(trigram_perplexity(folder, train_ids), 3),
        "recipe": recipe,
        "history": progress["history"],
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_card(folder, record)
    print(json.dumps({k: v for k, v in record.items() if k != "history"}, indent=2))


def main() -> None:
    """Print the figures of a finished folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(json.dumps(heldout_figures(parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    main()
