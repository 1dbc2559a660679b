"""`llm-coreml push`: publish a bundle on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import FORMAT, PATH, VERBOSE


@click.command("push")
@click.argument("bundle", type=PATH)
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--revision", metavar="BRANCH", help="A branch that is there, other than main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", help="What the commit says.")
@click.option(
    "--tasks",
    type=PATH,
    multiple=True,
    help="Results of lm-eval, which become .eval_results of the repository; several.",
)
@FORMAT
@VERBOSE
def push_command(
    bundle: Path,
    repository: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    tasks: tuple[Path, ...],
    form: str,
    verbose: bool,
) -> None:
    """Publish a bundle on the Hugging Face hub, in one commit.

    REPOSITORY is owner/name, made if it is not there. The results of eval go along and into the
    card. The token is HF_TOKEN, or that of `hf auth login`.

    \b
    llm-coreml push out me/my-model-coreml --private
    """
    from llm_coreml.cli.terminal import terminal

    with terminal(verbose) as screen:
        from llm_coreml.cli.cells import line
        from llm_coreml.eval.publish import push_to_hub
        from llm_coreml.pretrained import MESSAGE

        screen.progress.stage("push")
        address = push_to_hub(
            bundle,
            repository,
            tasks=tasks,
            private=private or None,
            revision=revision,
            commit_message=message or MESSAGE,
            create_pr=create_pr,
        )
        screen.show(form, {"repository": repository, "address": address}, lambda: line(address))
