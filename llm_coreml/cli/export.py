"""`llm-coreml export`: quantize, lower, verify, write a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llm_coreml.cli.options import (
    FORMAT,
    PATH,
    VERBOSE,
    memory,
    print_json,
)


def _lengths(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of numbers such as 1,8,64.") from None


@click.command("export")
@click.argument("model", metavar="RECIPE|HUB_ID|FOLDER", required=False)
@click.option("--model", "-m", "given", metavar="ID_OR_DIR", help="Use this model instead.")
@click.option("--output", "-o", type=PATH, help="Folder to make.")
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
    type=PATH,
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
    from llm_coreml.machine import peak_memory
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
