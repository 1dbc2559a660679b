"""What is inside an artifact, told and taken out without running it.

In come a bundle or a `.pte`; out go dataclasses for tables and JSON: methods, states, operations,
bytes, and the rules that an export broke; and the models themselves, as files. What is read is read
through `artifact` and `bundle`, and never changed.
"""
