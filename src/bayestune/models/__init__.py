"""A model's name → the model and its tokenizer, from a directory, the Hub, or a GGUF file.

GGUF weights are unpacked once into an ordinary directory.
"""

from bayestune.models.load import LoadedModel, load_default, load_model

__all__ = ["LoadedModel", "load_default", "load_model"]
