"""`make venv` shows that it is alive, and fails where pip fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BACKEND = """
import zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n NEEDS")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return name
"""


@pytest.fixture
def make(tmp_path):
    """Runs `make venv` for a package that needs what is named, with no index to get it from."""

    def run(needs):
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "constraints.txt").touch()
        (tmp_path / "backend.py").write_text(BACKEND.replace(" NEEDS", needs))
        (tmp_path / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        command = ["make", "venv", f"PYTHON={sys.executable}", "PIP_FLAGS=--no-index"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def test_pip_is_seen_at_work_and_its_failure_stays_one(make, tmp_path):
    failed = make("Requires-Dist: absent-package\\n")
    assert failed.returncode != 0 and "absent-package" in failed.stderr and "ready:" not in failed.stdout
    assert not (tmp_path / ".venv" / "installed").exists()
    done = make("")
    assert done.returncode == 0 and "Installing collected packages: tiny" in done.stdout and "ready:" in done.stdout
    assert "Requirement already" not in done.stdout and (tmp_path / ".venv" / "installed").exists()
