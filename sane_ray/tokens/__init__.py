"""Weights to token sequences and back: tokenizer, normalisation, symmetry, alignment, and the token store."""
