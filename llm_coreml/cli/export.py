"""`llm-coreml export`: quantize, lower, verify, write a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE
from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.cli.settings import given_settings, settings_options
from llm_coreml.config import ExportConfig

if TYPE_CHECKING:
    from llm_coreml.bundle.folder import Bundle


@click.command("export")
@click.argument("model", metavar="RECIPE|HUB_ID|FOLDER|GGUF", required=False)
@click.option(
    "--model", "-m", "given", metavar="ID_OR_DIR", help="Export this in the place of a recipe's."
)
@click.option("--output", "-o", type=PATH, help="Folder to make.  [default: the name and -coreml]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export there.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--local-files-only", is_flag=True, help="Hub ids: use the local cache only.")
@settings_options
@click.option(
    "--cache",
    type=PATH,
    help="Keep quantized weights here.  [default: $LLM_COREML_CACHE or ~/.cache/llm-coreml]",
)
@click.option("--no-cache", is_flag=True, help="Keep no quantized weights, and use none.")
@FORMAT
@VERBOSE
@click.pass_context
def export_command(
    call: click.Context,
    /,
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
    **_: Any,
) -> None:
    """Quantize a model, lower it, verify the file.

    \b
    llm-coreml export llama --bits 4                       the bundled model, offline
    llm-coreml export llama-3.2-1b -o llama                a recipe, from the hub
    llm-coreml export ./my-finetune --target ane --bits 4  a folder
    llm-coreml export ./model-Q4_0.gguf                    quantized already, taken as it is
    llm-coreml export ./my-finetune --size 600MB           mixed formats
    llm-coreml export my-recipe.yaml --bits 3              your own recipe, but for the bits
    """
    from llm_coreml.cli.terminal import terminal
    from llm_coreml.machine import peak_memory
    from llm_coreml.recipes import BUNDLED_RECIPE

    source = given or model
    if source is None:
        raise click.UsageError("Give a recipe, a hub id or a folder; see `llm-coreml ls`.")
    _check_cache(cache, no_cache)
    config = _config(call, model, given)
    folder = output or Path(f"{_name(source)}-coreml")
    with terminal(verbose) as screen:
        if source == BUNDLED_RECIPE and not Path(source).is_dir():
            screen.progress.note(
                "Exporting the small Llama that ships in the package; --model takes any other."
            )
        from llm_coreml.cli.tables import export_table
        from llm_coreml.pipeline import export

        make = functools.partial(
            export,
            source,
            output=folder,
            config=config,
            overwrite=overwrite,
            revision=revision,
            local_files_only=local_files_only,
            cache=cache or not no_cache,
            progress=screen.progress,
        )
        bundle = _made(folder, make)
        peak = peak_memory()
        told = {**bundle.manifest.to_json(), "peak_memory_bytes": peak}
        screen.show(form, told, lambda: export_table(bundle.manifest, str(folder), peak))


def _check_cache(cache: Path | None, no_cache: bool) -> None:
    """Refuse a folder of weights beside none, and the form of the KV cache in its place."""
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache contradict each other; give one of them.")
    if str(cache) in ("state", "inputs"):
        raise click.UsageError(
            f"--cache is the folder of quantized weights; the form of the KV cache is --kv-cache "
            f"{cache} (and a folder of that name ./{cache})."
        )


def _made(folder: Path, make: Callable[[], Bundle]) -> Bundle:
    """Return the bundle that `make` puts at `folder`; it counts as done once it is in its place."""
    from llm_coreml.bundle.folder import open_bundle

    before = _identity(folder)
    try:
        return make()
    except KeyboardInterrupt:
        if _identity(folder) in (None, before):
            raise
        INTERRUPTION.finish()
        return open_bundle(folder)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells the folder at `path` from another that takes its place, None for none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _config(call: click.Context, model: str | None, given: str | None) -> ExportConfig:
    """Return the settings of the recipe, if there is one, below those of the command line."""
    from llm_coreml.recipes import find_recipe, load_recipe

    named = None if given is None else find_recipe(given)
    recipe = named
    if model is not None:
        # Beside --model, only a recipe has anything to say.
        recipe = find_recipe(model) if given is None else load_recipe(model)
        if named is not None:
            raise click.UsageError(
                f"{model} and --model {given} are two recipes; give one of them, or a hub id or a "
                "folder as the model."
            )
    base = ExportConfig() if recipe is None else recipe.config
    return base.under(given_settings(call))


def _name(source: str) -> str:
    name = Path(source).absolute().name
    return name.removesuffix(".yaml").removesuffix(".yml").removesuffix(".gguf")
