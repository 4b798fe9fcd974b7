"""Weights to token sequences and back: tokenizer, normalisation, symmetry, and the token store."""
