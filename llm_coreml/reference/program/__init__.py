"""One function of a Core ML model: compiled once into steps, then run in torch."""
