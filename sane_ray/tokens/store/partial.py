"""A folder that is either complete or not there: written beside its place, locked, and renamed at the end.

Never waits for a lock, and never touches a folder that a living process holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from sane_ray.errors import InputError

_LOCK = ".lock"


@contextlib.contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """An empty hidden sibling that becomes the destination when the block ends well, and vanishes otherwise.

    The kernel frees the lock of a writer that dies, so a folder that nobody holds is a leftover and is cleared. A block
    that leaves the folder empty leaves nothing.

    Raises:
        InputError: Another run holds the folder, or it cannot be made.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    lock = _lock(partial, destination)
    try:
        for child in partial.iterdir():
            if child.name != _LOCK:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        yield partial
        if any(child.name != _LOCK for child in partial.iterdir()):
            partial.rename(destination)
            (destination / _LOCK).unlink()  # only now: no other run may lock a folder that is about to move
        else:
            shutil.rmtree(partial)
    except BaseException:
        _remove(partial)
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, destination: Path) -> int:
    path = partial / _LOCK
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another run moved its folder away just now
        except OSError as error:
            raise InputError(f"--store {destination} cannot be written ({error}): name another --store") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(errors="replace") if path.exists() else ""
            os.close(lock)
            raise InputError(
                f"--store {destination}: another run is writing it ({holder or 'some process'} holds {path}); wait "
                "for its end, or name another --store"
            ) from error
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return lock
        os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a folder into which tasks that are being cancelled may still write."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
