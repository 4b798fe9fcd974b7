"""One Ray session for all tests, on its own ports and temporary folder; tests of pure functions never touch it."""

import shutil
import tempfile
from pathlib import Path

import pytest

PARITY = Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of numbers computed with the published code; see its README."""
    return PARITY


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with 4 logical CPUs, started once and ended at the end; only what it started is stopped."""
    import os

    os.environ.pop("RAY_ADDRESS", None)
    from sane_ray.cluster import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    folder = tempfile.mkdtemp(prefix="sr")  # short: Ray's socket paths are limited to 107 characters
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level="warning", _temp_dir=folder
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
