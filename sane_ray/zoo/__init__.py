"""Checkpoints, what is known of them, and a builder of zoos of small networks."""
