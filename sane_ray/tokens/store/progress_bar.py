"""The bar that shows how far work over a zoo is, with the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, total: float | None, unit: str, delay: float = 0.0) -> tqdm[Any]:
    """A progress bar: lively on a terminal, a line now and then in a log. Bytes and tokens are told in thousands.

    Without a total it shows no time left. What is done within ``delay`` seconds never shows.
    """
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit in ("B", "token"), mininterval=interval, delay=delay)
