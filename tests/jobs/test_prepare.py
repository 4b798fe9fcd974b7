"""The prepare job as a user runs it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sane_ray.config import PrepareJob, TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store import TokenStore

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("prepare", ROOT / "jobs" / "prepare.py")
assert SPEC is not None and SPEC.loader is not None
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for model in range(4):
        folder = tmp_path / "zoos" / "digits" / f"model_{model}"
        for epoch in range(2):
            (folder / f"checkpoint_{epoch}").mkdir(parents=True)
            weights = {
                "fc.weight": torch.randn(3, 5, generator=generator),
                "fc.bias": torch.randn(3, generator=generator),
            }
            torch.save(weights, folder / f"checkpoint_{epoch}" / "checkpoints")
        (folder / "params.json").write_text(json.dumps({"seed": model}))
    return tmp_path / "zoos" / "digits"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_a_store_is_written_once_and_says_what_is_next(ray_session, zoo: Path, tmp_path: Path, capsys):
    job = PrepareJob(source=str(zoo), store=str(tmp_path / "store"))
    prepare.main(job, False)
    first = capsys.readouterr().out
    assert first.startswith(f"store {tmp_path / 'store'}: 8 checkpoints of 4 models, 24 tokens")
    assert first.endswith(f"next: python jobs/pretrain.py --store {tmp_path / 'store'}\n")
    prepare.main(job, False)
    second = capsys.readouterr().out
    assert (
        second
        == f"nothing to do: {tmp_path / 'store'} is complete, and was prepared from these checkpoints and this "
        + (f"config\n{first}")
    )
    with pytest.raises(InputError, match=r"tokens\.dtype was 'float16' and is now 'float32'"):
        prepare.main(
            PrepareJob(source=str(zoo), store=str(tmp_path / "store"), tokens=TokensConfig(dtype="float32")), False
        )


def test_bad_files_are_named_at_the_end(ray_session, zoo: Path, tmp_path: Path, capsys):
    (zoo / "model_1" / "checkpoint_1" / "checkpoints").write_bytes(b"")
    prepare.main(PrepareJob(source=str(zoo), store=str(tmp_path / "s"), tokens=TokensConfig(max_skipped=0.2)), False)
    output = capsys.readouterr().out
    assert "left out model_1/checkpoint_1/checkpoints: the checkpoint file is empty" in output
    assert "7 checkpoints of 4 models" in output


def test_defaults_lie_under_the_storage(ray_session, zoo: Path, tmp_path: Path, capsys):
    prepare.main(PrepareJob(storage=str(tmp_path)), False)
    assert TokenStore.open(tmp_path / "stores" / "digits").counts().checkpoints == 8
    capsys.readouterr()
    prepare.main(PrepareJob(inspect=str(tmp_path / "stores" / "digits")), False)
    assert "fc.weight + bias" in capsys.readouterr().out


def test_a_dry_run_needs_no_ray_and_writes_nothing(zoo: Path, tmp_path: Path):
    done = run("--source", str(zoo), "--store", str(tmp_path / "store"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "would read 8 checkpoints of 4 models (2 train, 1 val, 1 test)" in done.stdout
    assert not (tmp_path / "store").exists() and not (tmp_path / ".store.partial").exists()


def test_a_missing_zoo_is_one_sentence_and_status_2(tmp_path: Path):
    done = run("--source", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == (
        f"error: --source {tmp_path / 'nowhere'} does not exist: name the folder of a zoo, or build one with "
        "`python jobs/build_zoo.py`"
    )


def test_help_teaches(tmp_path: Path):
    text = run("--help", cwd=tmp_path).stdout
    assert "python jobs/prepare.py --source ZOO --store STORE" in text and "--tokens.token_size" in text
