"""The command line: options in, one library call, a table or JSON out.

    llm-coreml export llama --bits 4 -o out
    llm-coreml eval out --format json

Results go to stdout, everything else to stderr; exit codes are those of `errors`. Heavy imports
happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import click

from llm_coreml.cli.looking import diff_command, inspect_command, run_command
from llm_coreml.cli.options import DEVICE, FORMAT, MODE, TEXT, VERBOSE, memory, print_json
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.progress import keep_one_heap


def _lengths(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of numbers such as 1,8,64.") from None


def _plain_names(name: str) -> str:
    return name.replace("_", "-")  # click has taken the leading hyphens off


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _plain_names,
        "max_content_width": 100,
    }
)
@click.version_option(package_name="llm-coreml")
def cli() -> None:
    """Export Hugging Face causal LMs to Core ML .pte files, and prove the result off-device.

    \b
    Exit codes: 0 done, 1 other error, 2 usage, 4 checkpoint, 5 unsupported, 6 output,
    7 artifact, 8 verification, 130 interrupted.
    """


@cli.command("export")
@click.argument("model", metavar="RECIPE|HUB_ID|FOLDER", required=False)
@click.option("--model", "-m", "given", metavar="ID_OR_DIR", help="Use this model instead.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export there.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--local-files-only", is_flag=True, help="Hub ids: use the local cache only.")
@click.option(
    "--bits",
    type=float,
    help="Bits per weight: 1, 2, 3, 4, 6, 8 or 16, or a mean such as 3.5.  [default: 4]",
)
@click.option("--size", callback=memory, metavar="BYTES", help="Mix formats to fit: 600MB, 1.2GB.")
@click.option("--plan", metavar="FILE", help="Formats of an earlier export: its manifest.json.")
@click.option("--scheme", help="Weight format, see `llm-coreml ls`; the target's by default.")
@click.option(
    "--group-size", type=int, default=32, show_default=True, help="int4-group and such: inputs."
)
@click.option(
    "--zero-point",
    type=click.Choice(["none", "int", "float"]),
    default="none",
    show_default=True,
    help="Integer formats: what is subtracted from codes, one for every scale.",
)
@click.option("--codebook-rows", type=int, help="codebook: rows per table.  [default: 16]")
@click.option("--codebook-columns", type=int, help="codebook: inputs per table.  [default: all]")
@click.option(
    "--codebook-vector", type=int, default=1, show_default=True, help="codebook: rows per entry."
)
@click.option("--codebook-scale", is_flag=True, help="codebook: a factor for each row.")
@click.option(
    "--embedding", default="int8-channel", show_default=True, help="Scheme of the token table."
)
@click.option("--lm-head", help="Scheme of the output head; the token table's by default.")
@click.option(
    "--rotate",
    type=click.Choice(["none", "residual", "heads", "both"]),
    default="none",
    show_default=True,
    help="Spread outlying weights first, by rotations that leave the model's function as it is.",
)
@click.option(
    "--calibrate",
    metavar="bundled|FILE",
    help="Choose the linear layers' codes for what this text makes of them.",
)
@click.option(
    "--calibration-tokens",
    type=int,
    default=16384,
    show_default=True,
    help="Tokens of the text to read.",
)
@click.option(
    "--tune",
    type=int,
    default=0,
    metavar="STEPS",
    help="Then tune scales, tables and norms on it; holds the whole model.  [default: 0]",
)
@click.option(
    "--target", default="gpu", show_default=True, help="Compute unit: gpu, ane, cpu or all."
)
@click.option("--minimum-os", default="iOS18", show_default=True, help="Oldest system to run on.")
@click.option(
    "--compute-precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True
)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Rows of logits that a call returns.",
)
@click.option("--context", type=int, help="Positions of the KV cache.  [default: up to 2048]")
@click.option(
    "--seq-lengths",
    type=_lengths,
    metavar="N,N,...",
    help="Chunk lengths to accept.  [default: 1,8,64,512]",
)
@click.option(
    "--backend",
    type=click.Choice(["coreml", "xnnpack"]),
    default="coreml",
    show_default=True,
    help="xnnpack makes a twin that ExecuTorch's stock runner runs on Linux.",
)
@click.option(
    "--allow-inexact",
    is_flag=True,
    help="Take a quantized checkpoint that Core ML cannot hold exactly.",
)
@click.option("--force", is_flag=True, help="Export a scheme that the target is known to refuse.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Keep quantized weights here.  [default: $LLM_COREML_CACHE or ~/.cache/llm-coreml]",
)
@click.option("--no-cache", is_flag=True, help="Keep no quantized weights, and use none.")
@FORMAT
@VERBOSE
def export_command(
    model: str | None,
    given: str | None,
    output: Path | None,
    overwrite: bool,
    revision: str | None,
    local_files_only: bool,
    cache: Path | None,
    no_cache: bool,
    form: str,
    verbose: bool,
    **settings: Any,
) -> None:
    """Quantize a model, lower it to a .pte and verify that file.

    \b
    llm-coreml export llama --bits 4                       the bundled model, offline
    llm-coreml export llama-3.2-1b -o llama                a recipe, from the hub
    llm-coreml export ./my-finetune --target ane --bits 4  a folder
    llm-coreml export ./my-finetune --size 600MB           mixed formats
    """
    from llm_coreml.cli.terminal import terminal
    from llm_coreml.config import ExportConfig
    from llm_coreml.progress import peak_memory
    from llm_coreml.recipes import BUNDLED_RECIPE, load_recipe

    if model is not None and given is not None:
        load_recipe(model)
    source = given or model
    if source is None:
        raise click.UsageError("Give a recipe, a hub id or a folder; see `llm-coreml ls`.")
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache contradict each other; give one of them.")
    config = ExportConfig(**settings)
    folder = output or Path(f"{Path(source).absolute().name}-coreml")
    with terminal(verbose) as screen:
        if source == BUNDLED_RECIPE and not Path(source).is_dir():
            screen.progress.note(
                "Exporting the small Llama that ships in the package; --model takes any other."
            )
        from llm_coreml.pipeline import export

        bundle = export(
            source,
            output=folder,
            config=config,
            overwrite=overwrite,
            revision=revision,
            local_files_only=local_files_only,
            cache=cache or not no_cache,
            progress=screen.progress,
        )
        screen.progress.close()
        peak = peak_memory()
        if form == "json":
            print_json(screen.result.file, {**bundle.manifest, "peak_memory_bytes": peak})
        else:
            from llm_coreml.cli.tables import export_table

            screen.result.print(export_table(bundle.manifest, str(folder), peak))


@cli.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", "-m", metavar="ID_OR_DIR", help="The original, if it was moved.")
@TEXT
@click.option("--tokens", type=int, default=2048, show_default=True, help="Most tokens to score.")
@click.option("--artifact-only", is_flag=True, help="Do not load the original.")
@MODE
@DEVICE
@FORMAT
@VERBOSE
def eval_command(
    bundle: Path,
    model: str | None,
    text: Path | None,
    tokens: int,
    artifact_only: bool,
    mode: str,
    device: str,
    form: str,
    verbose: bool,
) -> None:
    """Measure an export: perplexity, divergence from the original, latency, size.

    Runs the program inside the .pte on this machine and writes results.json into the folder.
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import evaluation_table
        from llm_coreml.eval.evaluate import evaluate
        from llm_coreml.reference.program.execution import Execution

        result = evaluate(
            bundle,
            model=model,
            text=text,
            tokens=tokens,
            artifact_only=artifact_only,
            execution=Execution(mode, device),
            progress=screen.progress,
        )
        screen.progress.close()
        if form == "json":
            print_json(screen.result.file, result.to_json())
        else:
            screen.result.print(evaluation_table(result))


@cli.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@MODE
@DEVICE
@VERBOSE
def generate_command(
    bundle: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    mode: str,
    device: str,
    verbose: bool,
) -> None:
    """Continue a text with the program inside the .pte, on this machine."""
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.bundle.language_model import load
        from llm_coreml.reference.program.execution import Execution

        pieces = load(bundle, Execution(mode, device)).stream(
            prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        for piece in pieces:
            click.echo(piece, file=screen.result.file, nl=False)
        click.echo(file=screen.result.file)


@cli.command("show")
@click.argument("path", type=click.Path(path_type=Path))
@FORMAT
@VERBOSE
def show_command(path: Path, form: str, verbose: bool) -> None:
    """Tell what is in a bundle or a .pte: method, states, ops, bytes."""
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.tables import contents_table
        from llm_coreml.inspect.contents import contents

        found = contents(path)
        if form == "json":
            print_json(screen.result.file, found)
        else:
            screen.result.print(contents_table(found))


@cli.command("ls")
@FORMAT
def ls_command(form: str) -> None:
    """List recipes, targets and weight schemes."""
    from rich.console import Console

    from llm_coreml.cli.tables import listing_table
    from llm_coreml.quantize.formats.schemes import SCHEMES
    from llm_coreml.recipes import load_recipe, recipe_names
    from llm_coreml.targets import TARGETS

    recipes = {name: load_recipe(name).description for name in recipe_names()}
    targets = {
        name: f"{target.summary}; --bits 4 is {target.default_scheme}"
        for name, target in TARGETS.items()
    }
    lists = {"recipes": recipes, "targets": targets, "schemes": dict(SCHEMES)}
    if form == "json":
        print_json(sys.stdout, lists)
        return
    console = Console(highlight=False, soft_wrap=True)
    for title, rows in lists.items():
        console.print(listing_table(title, rows))
        console.print()


for command in (diff_command, inspect_command, run_command):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    keep_one_heap()
    try:
        code = cli.main(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except LlmCoreMLError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was written.", err=True)
        code = 130
    except Exception as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            traceback.print_exc()
        click.echo(
            f"Error: an unexpected {type(error).__name__} in llm-coreml: {error}. Run again with "
            "-v for the traceback, and please report it.",
            err=True,
        )
        code = 1
    if code:
        # Open temporary files of a failed library find their folder gone; nobody needs to know.
        sys.unraisablehook = lambda _: None
    sys.exit(code)


if __name__ == "__main__":
    main()
