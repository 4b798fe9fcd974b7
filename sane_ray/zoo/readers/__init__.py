"""Zoo formats: one module a format, each with ``LOOKS_FOR`` (what it looks for, in words) and ``discover(root)``.

A reader lists what is there and what is known of it; it never opens the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Value = float | int | str | None
"""One property of a checkpoint, or one setting of its training."""


@dataclass(frozen=True)
class Record:
    """One checkpoint of a zoo: where its weights lie, and what is known of it."""

    id: str
    """Unique in its zoo: ``<model>/<epoch>``."""
    model: str
    """The trained network it is a checkpoint of: the folder's path inside the zoo."""
    epoch: int
    """Epochs trained; 0 is the initialisation."""
    path: str
    """Absolute path of the weights."""
    properties: dict[str, Value] = field(default_factory=dict)
    """Measured at this checkpoint: accuracies, losses, generalisation gap; empty where nothing was recorded."""
    config: dict[str, Value] = field(default_factory=dict)
    """How the model was trained."""
