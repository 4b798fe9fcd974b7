"""What tests of readers share."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def _unprivileged() -> Iterator[None]:
    """Without the rights of root, whom no permission stops."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def unprivileged():
    """A context in which the permissions of files count, whoever runs the test."""
    return _unprivileged


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can look into too, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
