"""`llm-coreml ls`: recipes, targets and schemes."""

from __future__ import annotations

import click

from llm_coreml.cli.options import FORMAT


@click.command("ls")
@FORMAT
def ls_command(form: str) -> None:
    """List recipes, targets and weight schemes."""
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose=False) as screen:
        from llm_coreml.cli.tables import lists_table
        from llm_coreml.quantize.formats.schemes import SCHEMES
        from llm_coreml.recipes import load_recipe, recipe_names
        from llm_coreml.targets import TARGETS

        recipes = {name: load_recipe(name).description for name in recipe_names()}
        targets = {
            name: f"{target.summary}; --bits 4 is {target.default_scheme}"
            for name, target in TARGETS.items()
        }
        lists = {"recipes": recipes, "targets": targets, "schemes": dict(SCHEMES)}
        screen.show(form, lists, lambda: lists_table(lists))
