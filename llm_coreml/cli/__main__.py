"""`python -m llm_coreml.cli` is the command `llm-coreml`."""

from llm_coreml.cli.main import main

if __name__ == "__main__":
    main()
