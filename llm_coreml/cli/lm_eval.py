"""`llm-coreml lm-eval`: the tasks of lm-eval on a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import DEVICE, FORMAT, MODE, PATH, UNCHECKED, VERBOSE


@click.command("lm-eval")
@click.option(
    "--model", "-m", type=PATH, required=True, help="The bundle that an export wrote, or a model."
)
@click.option("--tasks", "-t", required=True, help="Names, separated by commas; * is any letters.")
@click.option(
    "--include-path", type=PATH, help="Folder of further tasks: YAML, which may run code."
)
@click.option("--num-fewshot", type=int, help="Examples before each question, if not the task's.")
@click.option("--limit", type=float, help="Most documents of each task; below 1, a share of them.")
@click.option("--apply-chat-template", is_flag=True, help="Ask in the model's chat template.")
@click.option("--system-instruction", help="The system message.")
@click.option("--gen-kwargs", help="Settings of generation: max_gen_toks=64,temperature=0.8.")
@click.option("--use-cache", type=PATH, help="Keep answers in this file, to go on where it ended.")
@click.option("--max-length", type=int, help="Most tokens read at once, if not the context.")
@click.option("--output", "-o", type=PATH, help="Folder for the results, in lm-eval's layout.")
@click.option("--log-samples", is_flag=True, help="Write questions and answers there, too.")
@MODE
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def lm_eval_command(
    model: Path,
    tasks: str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: float | None,
    apply_chat_template: bool,
    system_instruction: str | None,
    gen_kwargs: str | None,
    use_cache: Path | None,
    max_length: int | None,
    output: Path | None,
    log_samples: bool,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Run tasks of lm-eval on an export.

    The program inside the .pte answers, on this machine. lm-eval is an extra:
    pip install 'llm-coreml[lm-eval]'.

    \b
    llm-coreml lm-eval --model out --tasks wikitext,arc_easy -o results
    """
    from llm_coreml.cli.terminal import terminal

    if log_samples and output is None:
        raise click.UsageError("--log-samples writes into the folder of --output; give one.")
    with terminal(verbose) as screen:
        from llm_coreml.cli.task_table import task_table
        from llm_coreml.eval.harness.saved import to_plain
        from llm_coreml.eval.harness.tasks import TaskSettings, run_tasks
        from llm_coreml.reference.program.execution import Execution

        results = run_tasks(
            model,
            TaskSettings(
                tasks=tuple(tasks.split(",")),
                include=include_path,
                few_shots=num_fewshot,
                limit=limit,
                chat=apply_chat_template,
                system=system_instruction,
                generation=gen_kwargs,
                cache=use_cache,
                max_length=max_length,
            ),
            output=output,
            samples=log_samples,
            execution=Execution(mode, device),
            checked=not unchecked,
            progress=screen.progress,
        )
        screen.show(form, to_plain(results), lambda: task_table(results))
