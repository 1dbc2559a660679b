"""`llm-coreml run`: feed any Core ML program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    MODE,
    PATH,
    UNCHECKED,
    VERBOSE,
    memory,
)

if TYPE_CHECKING:
    from llm_coreml.runtime.ports import Named, Runnable


@click.command("run")
@click.argument("file", metavar="BUNDLE_OR_PTE_OR_MLPACKAGE", type=PATH)
@click.option("--inputs", "-i", type=PATH, help="Named tensors: a .npz or .safetensors file.")
@click.option("--output", "-o", type=PATH, help="Where to write the outputs, in either format.")
@click.option("--function", help="Function of the Core ML program; its default one otherwise.")
@click.option("--method", help="Run this method of a .pte as a whole, kernels included.")
@click.option("--state-in", type=PATH, help="States to begin with; zeros otherwise.")
@click.option("--state-out", type=PATH, help="Where to write the states afterwards.")
@click.option("--overwrite", is_flag=True, help="Replace the files of --output and --state-out.")
@MODE
@DEVICE
@click.option(
    "--memory-budget",
    callback=memory,
    metavar="SIZE",
    help="Memory for expanded weights, such as 4GB.  [default: half of the machine's]",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the program; with --mode fp32.")
@UNCHECKED
@FORMAT
@VERBOSE
def run_command(
    file: Path,
    inputs: Path | None,
    output: Path | None,
    function: str | None,
    method: str | None,
    state_in: Path | None,
    state_out: Path | None,
    overwrite: bool,
    unchecked: bool,
    form: str,
    verbose: bool,
    mode: str,
    device: str,
    memory_budget: int | None,
    compiled: bool,
) -> None:
    """Run a Core ML program once on named tensors.

    Without --inputs, tell what it takes and gives. Integers are converted to the declared width
    where every value fits; any other difference in element type or shape is refused.
    """
    if inputs is None and (output or state_in or state_out):
        raise click.UsageError("--output, --state-in and --state-out need --inputs.")
    if method is not None and (state_in or state_out):
        raise click.UsageError(
            "--state-in and --state-out belong to a Core ML program; leave --method out."
        )
    if output is not None and output == state_out:
        raise click.UsageError("--output and --state-out are the same file; give two.")
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.bundle.folder import program_at
        from llm_coreml.cli.tables import interface_table, outputs_table
        from llm_coreml.reference.program.execution import Execution
        from llm_coreml.runtime.ports import open_runnable
        from llm_coreml.runtime.tensor_files import check_target, read_tensors

        for target in (output, state_out):
            if target is not None:
                check_target(target, overwrite)
        given = None if inputs is None else read_tensors(inputs)
        states = None if state_in is None else read_tensors(state_in)
        execution = Execution(mode, device, memory_budget, compiled)
        runnable = open_runnable(
            program_at(file, not unchecked), function=function, method=method, execution=execution
        )
        if given is None:
            interface = runnable.interface()
            screen.show(form, interface, lambda: interface_table(str(file), interface))
            return
        results = _run(runnable, given, states, (output, state_out), overwrite)
        screen.show(form, {"outputs": results}, lambda: outputs_table(results))


def _run(
    runnable: Runnable,
    given: Named,
    states: Named | None,
    targets: tuple[Path | None, Path | None],
    overwrite: bool,
) -> dict[str, Any]:
    """Run once, write what is asked for, and describe the outputs."""
    from llm_coreml.runtime.ports import describe
    from llm_coreml.runtime.tensor_files import write_tensors

    if states is not None:
        runnable.restore(states)
    outputs = runnable.run(given)
    output, state_out = targets
    if output is not None:
        write_tensors(output, outputs, overwrite=overwrite)
    if state_out is not None:
        write_tensors(state_out, runnable.snapshot(), overwrite=overwrite)
    return {name: describe(value) for name, value in outputs.items()}
