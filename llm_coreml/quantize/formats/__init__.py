"""Weight formats that Core ML can hold: what each costs, and how a matrix gets there.

In come weights `[out, in]` and a scheme; out go tensors of codes, scales and tables, whose values
are those that the program will hold. Nothing here knows of models, texts or targets.
"""
