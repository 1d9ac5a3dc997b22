"""A model's name → the model and its tokenizer, from a directory, the Hub, or a GGUF file.

GGUF weights are unpacked once into an ordinary directory.
"""

from bayestune.models.bits import is_bits
from bayestune.models.load import LoadedModel, load_default, load_model

__all__ = ["LoadedModel", "is_bits", "load_default", "load_model"]
