"""What a job imports before it has anything to do: `--help` and `--dry-run` should not wait for Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LISTED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(*sys.modules, file=sys.stderr)
"""


def imported(job, *arguments, cwd):
    """Modules that a job has imported when it ends."""
    command = [sys.executable, "-c", LISTED, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("job", ["pretrain", "prepare", "build_zoo", "embed", "predict"])
def test_help_imports_nothing_heavy(job, tmp_path):
    assert not {"ray", "torch", "mlflow", "pandas", "numpy"} & imported(job, "--help", cwd=tmp_path)


@pytest.mark.parametrize("job", ["pretrain", "build_zoo"])
def test_a_dry_run_imports_no_ray(job, tmp_path):
    assert not {"ray", "mlflow", "torch.distributed.fsdp"} & imported(job, "--dry-run", cwd=tmp_path)
