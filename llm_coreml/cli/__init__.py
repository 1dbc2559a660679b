"""The command line: one file for each verb, and what they share.

In come words; out go a table or JSON on stdout, everything else on stderr, and an exit code of
`errors`. A verb makes one library call and decides nothing itself. Heavy imports happen inside of
commands, so that `--help` is quick.
"""
