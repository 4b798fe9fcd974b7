"""Commands as a user can type them, for the lines that say what to do next. Runs nothing."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command(name: str) -> str:
    """How to call a program of this environment: by its name where the shell finds this one, else by its path."""
    ours, found = Path(sys.executable).parent / name, shutil.which(name)
    if not ours.exists() or (found and Path(found).absolute() == ours.absolute()):
        return name
    folder = Path.cwd()
    return shlex.quote(str(ours.relative_to(folder) if ours.is_relative_to(folder) else ours))


def this_command() -> str:
    """The command that is running, as it can be typed."""
    return shlex.join(["python", *sys.argv])
