"""What is inside an artifact, told without running it.

In come a bundle or a `.pte`; out go dataclasses for tables and JSON: methods, states, operations,
bytes, and the rules that an export broke. Files are read through `artifact` and `bundle`, and never
changed.
"""
