"""The one error that means "your input is wrong, and here is the remedy".

Jobs print it as a sentence and exit with status 2; everything else is a defect and keeps its traceback.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: a path, a file's content, a config value, or two things that do not fit.

    The message names the file or the dotted config field, the offending value, and what to do about it.
    """
