"""The process `llm-coreml`, which is also `python -m llm_coreml.cli`."""

from __future__ import annotations

import sys

from llm_coreml.errors import SystemUnfitError
from llm_coreml.host import check_host


def run() -> None:
    """Run the command line as a process of its own, and exit with its code."""
    try:
        check_host()
    except SystemUnfitError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    from llm_coreml.cli import process

    process.begin()
    try:
        # Takes a tenth of a second, in which Ctrl-C may come as well.
        from llm_coreml.cli.main import main

        main()
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        sys.exit(process.INTERRUPTION.code)
    finally:
        process.end()


if __name__ == "__main__":
    run()
