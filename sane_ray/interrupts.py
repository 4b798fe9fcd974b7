"""Ctrl-C, and SIGTERM as `ray job stop` and Kubernetes send it: told at once, then an orderly end; a second one kills.

Never decides what an orderly end is: that is for whoever sees the ``KeyboardInterrupt`` pass.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it, and after SIGTERM."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


@contextmanager
def interruptible(message: str, end: Callable[[], None] = lambda: None) -> Iterator[None]:
    """For the block's duration, the first signal prints a line, calls ``end`` and raises ``KeyboardInterrupt``.

    From then on the process is ending: the next signal ends it at once, with status 130, after the block too. Outside
    the main thread, where Python allows no handlers, nothing is changed.

    Args:
        message: the line, for standard error.
        end: what to do first.
    """

    def interrupted(number: int, frame: Any) -> None:
        set_handlers(dict.fromkeys(_SIGNALS, lambda *_: os._exit(INTERRUPTED)))
        os.write(_STDERR, f"\n{message}\n".encode())  # whoever was just printing holds the lock of sys.stderr
        end()
        raise KeyboardInterrupt

    before = handlers()
    set_handlers(dict.fromkeys(_SIGNALS, interrupted))
    try:
        yield
    finally:
        if interrupted in handlers().values():
            set_handlers(before)


def handlers() -> dict[signal.Signals, Any]:
    """What answers each of the signals."""
    return {number: signal.getsignal(number) for number in _SIGNALS}


def set_handlers(wanted: dict[signal.Signals, Any]) -> None:
    """Lets these answer, where that is possible: in the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in wanted.items():
            signal.signal(number, handler)
