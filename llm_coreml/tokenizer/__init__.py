"""The tokenizer of a bundle: text to ids and back, chat templates, and what a source's files lack.

tokenizer = Tokenizer(Path("out/tokenizer.json"))
tokenizer.prompt("def add(a, b):")
"""

from llm_coreml.tokenizer.text_tokenizer import Tokenizer

__all__ = ["Tokenizer"]
