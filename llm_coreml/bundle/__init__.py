"""The folder that an export writes, and what is read from it."""
