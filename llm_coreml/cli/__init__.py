"""The command line: one file for each verb, and what they share.

In come words; out go a table or JSON on stdout, everything else on stderr, and an exit code of
`errors`. A verb hands its options to the library, one call for most and a few for `run`, and shows
what comes back; what things mean is decided below. Heavy imports happen inside of commands, so that
`--help` is quick.
"""
