"""The bar that shows how far work over a zoo is, with the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def checkpoint_bar(what: str, total: int, unit: str = "checkpoint") -> tqdm[Any]:
    """A progress bar over checkpoints or their parts: lively on a terminal, a line now and then in a log."""
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=unit == "token", mininterval=0.2 if sys.stderr.isatty() else 10
    )
