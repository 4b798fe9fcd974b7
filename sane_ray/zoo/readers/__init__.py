"""Zoo formats, one module each. A reader says what it looks for, lists what is there, and opens it when asked.

Every reader module has ``NAME`` (as in ``--reader``), ``LOOKS_FOR`` (what it looks for, in words), ``discover(root)``
(the records of a file or folder, or none if it holds nothing of this format; never opens the weights of a zoo of many
files) and ``open_checkpoint(record)`` (the tensors, read lazily; never runs code from the file).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    """Epochs trained; 0 is the initialisation, or a format that knows no epochs."""
    path: str
    """Absolute path of the weights, or of the file or folder that holds them among others."""
    properties: dict[str, Value] = field(default_factory=dict)
    """Measured at this checkpoint: accuracies, losses, generalisation gap; empty where nothing was recorded."""
    config: dict[str, Value] = field(default_factory=dict)
    """How the model was trained."""
    reader: str = "tune"
    """Name of the reader that opens it."""
    member: str = ""
    """Where in the file they lie, in the reader's own words (a row, a name in an archive); empty is all of it."""
    license: str | None = None
    """Licence of the weights, as the zoo names it."""
    parents: tuple[str, ...] = ()
    """Lineage: the models that this one was made from, such as the base model of a fine-tuned one."""
    beside: tuple[str, ...] = ()
    """Absolute paths of other files that decide what the weights are, such as the layout of an array's columns."""
    sha256: str | None = None
    """Of the weights, where a catalog says it; other weights in the file are not the checkpoint that it describes."""
    split: str | None = None
    """``train``, ``val`` or ``test`` where the zoo comes with a published split."""


def bare(record: Record) -> Record:
    """The record without what is known of the network: enough to open it, and light to send to tasks."""
    return replace(record, properties={}, config={})
