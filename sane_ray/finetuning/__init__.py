"""Evaluates and fine-tunes generated models, many at once, in actors of a Ray cluster."""
