"""Train the demo model that ships with the package, from text that ships with Python.

The toolkit needs a real language model at hand whenever no network is: one small enough to
bundle, yet good enough that the loss from coarse weights shows. This script builds all of
it: the tokenizer, a Llama of a few million parameters, the held-out text that perplexity is
measured on, a 3-gram baseline on the same tokens, and a record of the figures. Every step's
batch and dropout depend on the seed and the step's number alone, so a run continued with
`--resume` sees what an unbroken one would have seen.

Example:
    python scripts/demo/train_demo_model.py --output llm_coreml/demo
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from demo_corpus import Corpus, Document, build_corpus, size
from demo_evaluation import score
from demo_report import write_report
from demo_tokenizer import BOS_ID, EOS_ID, encode, save_tokenizer, train_tokenizer

CONTEXT = 1024
# Enough for three texts of 64,000 tokens that have nothing in common.
CALIBRATION_BYTES = 720_000
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    steps: int = 1200
    decay_steps: int = 400
    warmup_steps: int = 40
    batch: int = 4
    muon_rate: float = 6e-3
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip: float = 1.0
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 704
    seed: int = 0
    threads: int = 2
    validate_every: int = 100


@dataclass
class Progress:
    """What a run has come to so far; saved with the state so that it can continue."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_validation_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a freshly initialised model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * recipe.layers))
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop what each block adds to the residual stream; Llama itself has no such option."""

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return functional.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def joined(documents: Sequence[Document]) -> str:
    """Return documents as one plain text, the form in which perplexity is measured."""
    return "\n\n".join(document.text for document in documents) + "\n"


def calibration_documents(corpus: Corpus, seed: int) -> list[Document]:
    """Return what quantization may look at: what was not trained on first, then some that was."""
    chosen = list(corpus.validation)
    for document in random.Random(seed).sample(corpus.train, len(corpus.train)):
        if size(chosen) >= CALIBRATION_BYTES:
            break
        chosen.append(document)
    return chosen


def epoch_windows(documents: Sequence[list[int]], seed: int) -> Tensor:
    """Shuffle the documents, cut them at a random offset, and shuffle the windows."""
    rng = random.Random(seed)
    order = rng.sample(range(len(documents)), len(documents))
    stream = [token for i in order for token in (BOS_ID, *documents[i], EOS_ID)]
    step = CONTEXT - 1
    offset = rng.randrange(step)
    starts = list(range(offset, len(stream) - step + 1, step))
    rng.shuffle(starts)
    # A window begins with the begin-of-text token wherever it was cut, as in evaluation.
    return torch.tensor([[BOS_ID, *stream[start : start + step]] for start in starts])


def batches(documents: Sequence[list[int]], recipe: Recipe, first: int) -> Iterator[Tensor]:
    """Yield the batch of each step from `first` on."""
    total = sum(len(document) + 2 for document in documents)
    per_epoch = (total // (CONTEXT - 1) - 1) // recipe.batch
    epoch, windows = -1, torch.empty(0)
    for step in range(first, recipe.steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            windows = epoch_windows(documents, recipe.seed * 100_003 + epoch)
        position = step % per_epoch * recipe.batch
        yield windows[position : position + recipe.batch]


def rate_factor(recipe: Recipe, step: int) -> float:
    """Warm up, hold, then fall to zero along a half cosine."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    into_decay = max(0, step - (recipe.steps - recipe.decay_steps)) / recipe.decay_steps
    return warm * 0.5 * (1 + math.cos(math.pi * into_decay))


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices in the blocks and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    embedding = model.model.embed_tokens.weight
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.muon_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [
        {"params": [embedding], "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [muon, torch.optim.AdamW(groups, lr=recipe.adam_rate, betas=(0.9, 0.95))]


def training_step(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Tensor,
    recipe: Recipe,
    step: int,
) -> float:
    """Take one step in bf16 arithmetic over fp32 weights and return the loss."""
    torch.manual_seed(recipe.seed * 100_003 + step)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    model.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer, rate in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(recipe, step)
        optimizer.step()
    return float(loss.detach())


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in fp16, leaving the model itself in fp32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    nn.Module.to(copy, torch.float16)
    copy.save_pretrained(folder)


def train(
    recipe: Recipe,
    train_ids: Sequence[list[int]],
    validation: list[int],
    output: Path,
    resume: bool,
) -> Progress:
    """Train, keeping in `output` the weights that did best on the validation text."""
    model, progress = build_model(recipe), Progress()
    optimizers = build_optimizers(model, recipe)
    if resume:
        state = torch.load(output / STATE_FILE)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
    add_dropout(model, recipe.dropout)
    started, losses = time.monotonic() - progress.seconds, []
    for batch in batches(train_ids, recipe, progress.step):
        losses.append(training_step(model, optimizers, batch, recipe, progress.step))
        progress.step += 1
        if progress.step % recipe.validate_every and progress.step < recipe.steps:
            continue
        loss = score(model, validation, BOS_ID, CONTEXT).loss
        progress.seconds = time.monotonic() - started
        train_loss = sum(losses) / len(losses)
        losses.clear()
        progress.history.append(
            {"step": progress.step, "train_loss": train_loss, "validation_loss": loss}
        )
        print(f"{progress.history[-1]} {progress.seconds:.0f} s", flush=True)
        if loss < progress.best_validation_loss:
            progress.best_validation_loss, progress.best_step = loss, progress.step
            save_model(model, output)
        save_state(output, model, optimizers, progress)
    return progress


def save_state(
    output: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write what `--resume` needs."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    torch.save(state, output / STATE_FILE)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and split")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--decay-steps", type=int, default=Recipe.decay_steps)
    parser.add_argument("--resume", action="store_true", help="continue a stopped run")
    parser.add_argument("--keep-state", action="store_true", help="keep what --resume needs")
    return parser.parse_args()


def main() -> None:
    """Build the tokenizer, train the model and write the report."""
    arguments = parse_arguments()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=arguments.steps, decay_steps=arguments.decay_steps, seed=arguments.seed)
    torch.set_num_threads(recipe.threads)
    corpus: Corpus = build_corpus(recipe.seed)
    tokenizer = train_tokenizer((d.text for d in corpus.train), recipe.vocabulary)
    save_tokenizer(tokenizer, output, CONTEXT)
    (output / "heldout.txt").write_text(joined(corpus.heldout), encoding="utf-8")
    calibration = joined(calibration_documents(corpus, recipe.seed))
    (output / "calibration.txt").write_text(calibration, encoding="utf-8")
    train_ids = [encode(tokenizer, document.text) for document in corpus.train]
    validation = encode(tokenizer, joined(corpus.validation))
    print(f"{size(corpus.train)} bytes, {sum(map(len, train_ids))} tokens to train on", flush=True)
    progress = train(recipe, train_ids, validation, output, arguments.resume)
    write_report(output, asdict(recipe), asdict(progress), corpus, train_ids, len(validation))
    if not arguments.keep_state:
        (output / STATE_FILE).unlink()


if __name__ == "__main__":
    main()
