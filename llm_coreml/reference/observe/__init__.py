"""What happens in a run: sizes of values, and where two runs part."""
