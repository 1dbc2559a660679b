"""What training with codebooks wins over choosing their codes for a text, at equal bytes.

The bundled model, in eager PyTorch: calibrated and tuned on segments of the calibration text, and
trained with tables of the same format on the same segments (`qat_config`), against the logits of
the original, by Adam, each step one window. All are read on held-out text that nobody trained on.
A seed is a segment and an order of its windows.

    python benchmarks/codebook_qat_quality.py --bits 2,3 --tokens 8192 --tune 150 --steps 300
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel

import llm_coreml
from calibration_quality import CONTEXT, made, segments, unquantized
from llm_coreml.bundle.record import bits_per_weight
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.eval.heldout import read_windows
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.calibrate.tune import tune
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner

_BETAS = (0.9, 0.99)


def logits_of(model: PreTrainedModel, window: Sequence[int]) -> torch.Tensor:
    """Return logits `[len(window), vocabulary]`, fp32."""
    found: torch.Tensor = model(torch.tensor([window])).logits[0]
    return found.float()


def trained(
    scheme: str, windows: Sequence[Sequence[int]], steps: int, rate: float, seed: int
) -> PreTrainedModel:
    """Return the bundled model trained with codebooks to give the original's logits.

    Args:
        scheme: As `qat_config` takes it.
        windows: What is read, in an order that `seed` draws for each round.
        steps: Windows read.
        rate: Adam's, which falls to zero in a straight line; of the layers' weights and the norms.
        seed: Of the order.
    """
    teacher, model = (
        AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
        for _ in range(2)
    )
    qat = llm_coreml.qat_config(scheme)
    quantize_(model, qat.prepare, qat.filter)
    model.train()
    # The table of tokens stays what it is in the other ways, too.
    moving = [each for name, each in model.named_parameters() if "embed_tokens" not in name]
    adam = torch.optim.Adam(moving, lr=rate, betas=_BETAS)
    fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, steps)
    for window in orders(windows, steps, seed):
        with torch.no_grad():
            wanted = logits_of(teacher, window).log_softmax(-1)
        given = logits_of(model, window).log_softmax(-1)
        loss = torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
        adam.zero_grad()
        loss.backward()
        adam.step()
        fall.step()
    model.config.use_cache = True
    return model.eval()


def orders(windows: Sequence[Sequence[int]], steps: int, seed: int) -> Iterator[Sequence[int]]:
    """Yield so many windows: all of them in a drawn order, and again in another."""
    draw = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        left = left or torch.randperm(len(windows), generator=draw).tolist()
        yield windows[left.pop()]


def ways(
    model: Model, bits: int, text: CalibrationText, given: argparse.Namespace, seed: int
) -> Iterator[tuple[str, Decoder, float, float]]:
    """Yield what is compared: its name, decoder, stored bits per weight, and seconds to make."""
    config = ExportConfig(scheme="codebook", bits=bits, target="ane", context=CONTEXT)
    stored = bits_per_weight(plan_for(resolve(config, model.spec), model), model.spec, 0)
    yield "rounded", made(model, config), stored, 0.0
    start = time.perf_counter()
    tuned = made(model, config, text)
    tune(tuned, unquantized(model), text.windows, given.tune)
    yield "calibrated and tuned", tuned, stored, time.perf_counter() - start
    start = time.perf_counter()
    live = open_model(trained(f"codebook:{bits}", text.windows, given.steps, given.rate, seed))
    usual = ExportConfig(target="ane", context=CONTEXT)
    stored = bits_per_weight(plan_for(resolve(usual, live.spec), live), live.spec, 0)
    yield "trained", made(live, usual), stored, time.perf_counter() - start


def main() -> None:
    """Measure every way for every seed, print a line for each, and the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", default="2,3", help="separated by commas")
    parser.add_argument("--tokens", type=int, default=8192, help="of each segment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", type=int, default=150, help="steps of tuning")
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--heldout", type=int, default=39_000, help="tokens to score")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(bundled_model())
    _, windows = read_windows(None, bundled_model() / "tokenizer.json", CONTEXT, given.heldout)
    original = EagerRunner(unquantized(model), "original")
    found: dict[tuple[int, str, float], list[Quality]] = {}
    for seed, text in enumerate(segments(bundled_model(), given.tokens, given.seeds)):
        for bits in map(int, given.bits.split(",")):
            for name, decoder, stored, seconds in ways(model, bits, text, given, seed):
                runners = {"original": original, name: EagerRunner(decoder, "eager fp32")}
                quality = measure_quality(runners, windows)[1]
                found.setdefault((bits, name, stored), []).append(quality)
                print(
                    f"seed {seed}, {bits} bits, {name}: {stored:.4f} bits per weight, perplexity "
                    f"{quality.perplexity:.3f}, KL {quality.mean_kl:.4f}, {seconds:.0f} s",
                    flush=True,
                )
    print("\n| codebook | way | bits per weight | perplexity | mean KL |\n|---|---|--:|--:|--:|")
    for (bits, name, stored), rows in sorted(found.items()):
        cells = (spread([row.perplexity for row in rows]), spread([row.mean_kl for row in rows]))
        print(f"| {bits} bits | {name} | {stored:.4f} | {cells[0]} | {cells[1]} |")


def spread(values: Sequence[float | None]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    numbers = [value for value in values if value is not None]
    mean = f"{statistics.mean(numbers):.4f}"
    return mean if len(numbers) == 1 else f"{mean} +- {statistics.stdev(numbers):.4f}"


if __name__ == "__main__":
    main()
