"""One function of a Core ML model: compiled once into steps, then run in torch.

In come a parsed model and how it is to be executed; out comes a program that takes and gives
tensors by name and keeps its states. Values are of the types that the program declares, and every
declared shape is checked.
"""
