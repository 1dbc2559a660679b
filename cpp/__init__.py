"""The runner in C++: sources that CMake builds, and what calls it from Python.

In come a bundle and tokens; out come the tokens that ExecuTorch makes of them, and how long that
took, in the form that a device reports too. `src/` and `CMakeLists.txt` know nothing of Python.
"""
