"""Words for a reader: what properties are called in pictures and reports, and counts of things."""

from __future__ import annotations

import re

PROPERTIES = {
    "test_acc": "test accuracy",
    "train_acc": "training accuracy",
    "val_acc": "validation accuracy",
    "test_loss": "test loss",
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "ggap": "generalisation gap",
    "training_iteration": "epoch",
}
"""Of those that zoos have; others are called as they are."""

GAP = "The generalisation gap (ggap) is the training accuracy minus the test accuracy."


def label(text: str) -> str:
    """The text with the property that it begins with in words: ``test accuracy by sane, ridge``."""
    return re.sub(r"^(?:property\.)?(\w+)", lambda found: PROPERTIES.get(found[1], found[0]), text)


def counted(count: int, what: str) -> str:
    """``1 model``, ``1,000 models``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
