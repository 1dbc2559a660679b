"""`llm-coreml generate`: continue a text, or answer messages."""

from __future__ import annotations

from pathlib import Path

import click

from llm_coreml.cli.options import (
    DEVICE,
    FORMAT,
    MODE,
    PATH,
    UNCHECKED,
    VERBOSE,
)


@click.command("generate")
@click.argument("bundle", type=PATH)
@click.option("--prompt", "-p", help="Text to continue, or the message to answer with --chat.")
@click.option(
    "--chat",
    is_flag=True,
    help="Answer by the model's chat template: --prompt, else every line of stdin in turn.",
)
@click.option("--system", help="With --chat: what the model is told before the first message.")
@click.option(
    "--max-new-tokens",
    type=int,
    help="Most tokens to add.  [default: 64; with --chat as many as the context holds]",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Share of probability to draw from."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The same one draws the same text."
)
@click.option("--stop", multiple=True, help="Text that ends the output; may be given repeatedly.")
@click.option(
    "--runtime",
    type=click.Choice(["python", "cpp"]),
    default="python",
    show_default=True,
    help="cpp: a runner in C++ on ExecuTorch, built when first used. On Linux it runs twins.",
)
@click.option(
    "--record",
    type=PATH,
    help="With --runtime cpp: measure it and write a file that eval takes as --import.",
)
@MODE
@DEVICE
@UNCHECKED
@FORMAT
@VERBOSE
def generate_command(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    runtime: str,
    record: Path | None,
    mode: str,
    device: str,
    unchecked: bool,
    form: str,
    verbose: bool,
) -> None:
    """Continue a text, or chat.

    The program inside the .pte is run on this machine, by the reference runtime.

    \b
    llm-coreml generate out --prompt "The capital of France"
    llm-coreml generate out --chat                    what is typed, turn by turn
    llm-coreml generate twin --prompt "..." --runtime cpp
    """
    from llm_coreml.cli.terminal import terminal

    if prompt is None and not chat:
        raise click.UsageError("Give --prompt a text to continue, or --chat.")
    if system is not None and not chat:
        raise click.UsageError("--system belongs to --chat; a text to continue has no such part.")
    if runtime == "cpp" and chat:
        raise click.UsageError("--chat keeps a cache from turn to turn; leave out --runtime cpp.")
    if record is not None and runtime != "cpp":
        raise click.UsageError("--record keeps what the C++ runner measured; give --runtime cpp.")
    with terminal(verbose) as screen:
        from llm_coreml.bundle.language_model import load
        from llm_coreml.cli.conversation import Asked, Conversation, continue_text
        from llm_coreml.cli.cpp_generation import continue_by_cpp
        from llm_coreml.reference.program.execution import Execution
        from llm_coreml.runtime.sampling import Sampling

        execution, checked = Execution(mode, device), not unchecked
        asked = Asked(max_new_tokens, Sampling(temperature, top_p, seed), stop)
        if chat:
            model = load(bundle, execution, checked)
            Conversation(model, screen, asked, form, system).run(prompt)
        elif prompt is not None and runtime == "cpp":
            continue_by_cpp(bundle, execution, checked, screen, asked, form, prompt, record)
        elif prompt is not None:
            continue_text(load(bundle, execution, checked), screen, asked, form, prompt)
