"""lm-eval's tasks on exports: a model for its evaluator, and a launcher, since it has no plugins.

In come a bundle and names of tasks; out go results in lm-eval's own schema and layout of files. It
is an optional extra: `pip install 'llm-coreml[lm-eval]'`. Only `adapter` and `tasks` import it.
"""
