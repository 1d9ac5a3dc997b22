"""Bayesian LoRA: fine-tune as with stock LoRA, get probabilities that can be trusted."""

__version__ = "0.1.0"
