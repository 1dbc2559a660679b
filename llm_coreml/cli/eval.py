"""`llm-coreml eval`: measure a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from llm_coreml.cli.track_options import TrackOptions, telling, tracked

if TYPE_CHECKING:  # rich, which --help does without
    from llm_coreml.cli.terminal import Screen


@click.command("eval")
@click.argument("bundle", type=PATH)
@click.option("--model", "-m", metavar="ID_OR_DIR", help="The original, if it was moved.")
@TEXT
@click.option("--tokens", type=int, default=2048, show_default=True, help="Most tokens to score.")
@click.option("--artifact-only", is_flag=True, help="Do not load the original.")
@click.option(
    "--results", type=PATH, metavar="DIR", help="Append a line to DIR/results.jsonl, too."
)
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
    text: Path | None,
    tokens: int,
    artifact_only: bool,
    results: Path | None,
    device_run: Path | None,
    device_name: str | None,
    gate_options: GateOptions,
    track_options: TrackOptions,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Measure an export: quality, latency and size.

    Perplexity, divergence from the original, time of a call, bytes of every part. Runs the program
    inside the .pte on this machine and writes results.json into the folder.

    \b
    llm-coreml eval out
    llm-coreml eval out --max-kl 0.05 --against baseline.json --junit gates.xml
    llm-coreml eval out --results results --track wandb:my-project --track tensorboard:runs
    llm-coreml eval out --import device.json --device-name "iPhone 16 Pro"
    """
    from llm_coreml.cli.terminal import terminal

    if (device_run is None) != (device_name is None):
        raise click.UsageError("--import and --device-name belong together; give both or none.")
    with terminal(verbose) as screen:
        if device_run is not None and device_name is not None:
            _import(screen, bundle, (device_run, device_name), track_options, not unchecked, form)
            return
        from llm_coreml.cli.tables import evaluation_table
        from llm_coreml.eval.evaluate import evaluate
        from llm_coreml.reference.program.execution import Execution

        gates = gate_options.gates(artifact_only)
        trackers = track_options.trackers(screen)
        result = evaluate(
            bundle,
            model=model,
            text=text,
            tokens=tokens,
            artifact_only=artifact_only,
            execution=Execution(mode, device),
            checked=not unchecked,
            results=results,
            progress=screen.progress,
        )
        document = result.to_json()
        failure = track_options.tell(screen, trackers, document, bundle)
        screen.show(form, document, lambda: evaluation_table(result))
        with telling(failure):
            gate_options.judge(gates, str(bundle), document)


def _import(
    screen: Screen,
    bundle: Path,
    device: tuple[Path, str],
    track_options: TrackOptions,
    checked: bool,
    form: str,
) -> None:
    """Put a device's figures into a bundle's results, and show those of all devices."""
    from llm_coreml.cli.cells import devices_table
    from llm_coreml.eval.devices import import_device_run

    trackers = track_options.trackers(screen)
    results, devices = import_device_run(bundle, *device, checked)
    with telling(track_options.tell(screen, trackers, results, bundle)):
        screen.show(form, results, lambda: devices_table(devices))
