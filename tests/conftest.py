"""One Ray session for all tests, on its own ports and temporary folder; tests of pure functions never touch it."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from sane_ray.cluster import local_ray, quieten

PARITY = Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="session", autouse=True)
def activated() -> None:
    """As in an environment that was activated, also where its Python was called by path."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of numbers computed with the published code; see its README."""
    return PARITY


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with 4 logical CPUs, started once and ended at the end; only what it started is stopped."""
    os.environ.pop("RAY_ADDRESS", None)
    quieten()
    import ray

    folder = tempfile.mkdtemp(prefix="sr")  # short: Ray's socket paths are limited to 107 characters
    with local_ray(4, folder):
        yield ray
    shutil.rmtree(folder, ignore_errors=True)
