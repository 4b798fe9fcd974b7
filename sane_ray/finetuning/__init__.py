"""Trains sampled networks on, many at once, and compares them epoch by epoch."""
