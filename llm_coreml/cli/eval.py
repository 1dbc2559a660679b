"""`llm-coreml eval`: measure a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.gate_options import GateOptions, gated
from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    MODE,
    PATH,
    TEXT,
    UNCHECKED,
    VERBOSE,
)
from llm_coreml.cli.track_options import Telling, TrackOptions, tracked

# As in `eval.runtimes`, which would bring torch.
RUNTIMES = ("auto", "reference", "executorch", "eager")

if TYPE_CHECKING:  # rich, which --help does without
    from llm_coreml.cli.terminal import Screen
    from llm_coreml.eval.results import Evaluation


@click.command("eval")
@click.argument("bundle", metavar="BUNDLE_OR_MODEL", type=PATH)
@click.option(
    "--model",
    "-m",
    metavar="ID_OR_DIR",
    help="The original, if it was moved, or nothing tells which it is.",
)
@click.option(
    "--tokenizer", type=PATH, help="A tokenizer.json or its folder, where none belongs to it."
)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default=RUNTIMES[0],
    show_default=True,
    help="What runs it: the reference runtime, ExecuTorch (Core ML on macOS, the XNNPACK twin "
    "anywhere), or PyTorch.",
)
@TEXT
@click.option("--tokens", type=int, default=2048, show_default=True, help="Most tokens to score.")
@click.option("--artifact-only", is_flag=True, help="Do not load the original.")
@click.option(
    "--results", type=PATH, metavar="DIR", help="Append a line to DIR/results.jsonl, too."
)
@click.option("--jobs", type=int, metavar="N", help="Windows at a time.  [default: by cores]")
@click.option(
    "--cache",
    type=PATH,
    help="Keep what the original makes of a text here.  [default: $LLM_COREML_CACHE or "
    "~/.cache/llm-coreml]",
)
@click.option("--no-cache", is_flag=True, help="Keep nothing, and go on from nothing.")
@click.option(
    "--import",
    "device_run",
    type=PATH,
    help="Measure nothing: put what a runner printed on a device into the results.",
)
@click.option("--device-name", help="With --import: what to call the device.")
@gated
@tracked
@MODE
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def eval_command(
    bundle: Path,
    model: str | None,
    tokenizer: Path | None,
    runtime: str,
    text: Path | None,
    tokens: int,
    artifact_only: bool,
    results: Path | None,
    jobs: int | None,
    cache: Path | None,
    no_cache: bool,
    device_run: Path | None,
    device_name: str | None,
    gate_options: GateOptions,
    tracking: TrackOptions,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Measure an export or a model: quality, latency and size.

    Perplexity, divergence from the original, time of a call, bytes of every part: of a bundle,
    which gets a results.json, a .pte, a .mlpackage, or a model by folder or hub id.

    \b
    llm-coreml eval model-0.mlpackage --tokenizer out --model models/llama
    llm-coreml eval out --max-kl 0.05 --against baseline.json --junit gates.xml
    llm-coreml eval out --results results --track wandb:my-project --track tensorboard:runs
    llm-coreml eval out --import device.json --device-name "iPhone 16 Pro"
    """
    _check_together(device_run, device_name, cache, no_cache)
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen, tracking.telling(screen) as trackers:
        if device_run is not None and device_name is not None:
            return _import(screen, bundle, device_run, device_name, trackers, not unchecked, form)
        from llm_coreml.eval.evaluate import evaluate
        from llm_coreml.reference.program.execution import Execution

        gates = gate_options.gates(artifact_only)
        result = evaluate(
            bundle,
            tokenizer,
            model=model,
            runtime=runtime,
            text=text,
            tokens=tokens,
            artifact_only=artifact_only,
            execution=Execution(mode, device),
            checked=not unchecked,
            results=results,
            cache=cache or not no_cache,
            jobs=jobs,
            progress=screen.progress,
        )
        document = _tell(trackers, result, bundle, results, form)
        gate_options.judge(gates, str(bundle), document)


def _tell(
    trackers: Telling, result: Evaluation, measured: Path, results: Path | None, form: str
) -> dict[str, Any]:
    """Tell trackers of an evaluation, show it, and return its document."""
    from llm_coreml.cli.tables import evaluation_table

    document = result.to_json()
    trackers.tell(document, measured, results)
    trackers.screen.show(form, document, lambda: evaluation_table(result))
    return document


def _check_together(
    device_run: Path | None, device_name: str | None, cache: Path | None, no_cache: bool
) -> None:
    """Refuse options that mean nothing without another, or with it."""
    if (device_run is None) != (device_name is None):
        raise click.UsageError("--import and --device-name belong together; give both or none.")
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache contradict each other; give one of them.")


def _import(
    screen: Screen,
    bundle: Path,
    run: Path,
    device: str,
    trackers: Telling,
    checked: bool,
    form: str,
) -> None:
    """Put a device's figures into a bundle's results, and show those of all devices."""
    from llm_coreml.cli.cells import devices_table
    from llm_coreml.eval.devices import import_device_run

    results, devices = import_device_run(bundle, run, device, checked)
    trackers.tell(results, bundle)
    screen.show(form, results, lambda: devices_table(devices))
