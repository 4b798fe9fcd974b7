"""The prepare job as a user runs it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

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
        f"error: --source {tmp_path / 'nowhere'} does not exist: name the folder of a zoo or a checkpoint file, "
        "or build one with `python jobs/build_zoo.py`"
    )


def nasty(folder: Path) -> Path:
    """A folder as users have them: twelve good models, and everything that can be wrong with a file."""
    generator = torch.Generator().manual_seed(1)

    def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        shapes = {"net.0.weight": (6, 5), "net.0.bias": (6,), "net.2.weight": (3, 6), "net.2.bias": (3,)}
        return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}

    for number in range(10):
        (folder / f"group_{number % 3}").mkdir(parents=True, exist_ok=True)
        torch.save(weights(), folder / f"group_{number % 3}" / f"good_{number}.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights().items()}}, folder / "wrapped.pth.tar")
    save_file(weights(torch.float16), folder / "模型.safetensors")
    torch.save(weights(torch.bfloat16) | {"k" * 300: torch.ones(2), "empty": torch.empty(0, 3)}, folder / "odd.pt")
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "cut.pt").write_bytes((folder / "group_0" / "good_0.pt").read_bytes()[:700])
    (folder / "noise.ckpt").write_bytes(bytes(range(256)) * 20)
    torch.save(torch.nn.Linear(5, 6), folder / "module.pt")
    torch.save(weights() | {"net.0.weight": torch.full((6, 5), torch.nan)}, folder / "nan.pt")
    torch.save(weights() | {"net.0.weight": torch.ones(6, 5, dtype=torch.int8)}, folder / "int8.pt")
    torch.save(torch.load(folder / "group_0" / "good_0.pt", weights_only=True), folder / "copy.pt")
    (folder / "gone.pt").symlink_to(folder / "nowhere.pt")
    (folder / "group_0" / "around").symlink_to(folder)
    return folder


def test_an_audit_tells_all_and_its_catalog_is_a_source(ray_session, tmp_path: Path, capsys):
    zoo = nasty(tmp_path / "models")
    tokens = TokensConfig(max_architectures=2, split=[1.0, 0.0, 0.0])
    prepare.main(PrepareJob(source=str(zoo), storage=str(tmp_path), audit=True, tokens=tokens), False)
    text = capsys.readouterr().out
    assert "dequantise it first" in text and "needs Python code" in text and "NaN or infinite" in text
    assert "left out: 9 of 22 checkpoints" in text
    catalog = tmp_path / "catalogs" / "models.parquet"
    assert text.endswith(f"next: python jobs/prepare.py --source {catalog} --tokens.max_architectures 2\n")
    assert not (tmp_path / "stores").exists()

    rows = pq.read_table(catalog).to_pylist()
    bad = ("cut", "empty", "gone", "group_0/good_0", "int8", "module", "nan", "noise", "text")
    assert {row["model"] for row in rows if row["status"] == "left out" and row["reason"]} == set(bad)
    prepare.main(PrepareJob(source=str(catalog), storage=str(tmp_path), tokens=tokens), False)
    assert TokenStore.open(tmp_path / "stores" / "models").counts().checkpoints == 13
    capsys.readouterr()


def test_weights_that_changed_since_the_audit_are_not_taken(tmp_path: Path, zoo: Path, capsys):
    job = PrepareJob(source=str(zoo), storage=str(tmp_path), audit=True)
    prepare.main(job, False)
    path = zoo / "model_1" / "checkpoint_0" / "checkpoints"
    torch.save({key: value + 1 for key, value in torch.load(path, weights_only=True).items()}, path)
    catalog = str(tmp_path / "catalogs" / "digits.parquet")
    prepare.main(PrepareJob(source=catalog, store=str(tmp_path / "store"), tokens=TokensConfig(max_skipped=0.2)), False)
    output = capsys.readouterr().out
    assert "model_1/checkpoint_0/checkpoints: its weights are not those of the catalog" in output
    assert TokenStore.open(tmp_path / "store").counts().checkpoints == 7


def test_an_audit_overwrites_no_other_catalog(tmp_path: Path, zoo: Path, capsys):
    job = PrepareJob(source=str(zoo), storage=str(tmp_path), audit=True)
    prepare.main(job, False)
    prepare.main(job, False)  # its own may be written again
    catalog = tmp_path / "catalogs" / "digits.parquet"
    table = pq.read_table(catalog)
    pq.write_table(table.slice(0, 3), catalog)  # as a user who removes rows
    with pytest.raises(InputError, match=r"is not what an audit of .* wrote: name another --catalog, or delete it"):
        prepare.main(job, False)
    with pytest.raises(InputError, match="name another --catalog"):
        prepare.main(dataclasses.replace(job, source=str(catalog)), False)
    prepare.main(dataclasses.replace(job, source=str(catalog), catalog=str(tmp_path / "mine.parquet")), False)
    assert len(pq.read_table(catalog)) == 3 and len(pq.read_table(tmp_path / "mine.parquet")) == 3


def test_what_cannot_be_aligned_is_said(tmp_path: Path, zoo: Path, capsys):
    tokens = TokensConfig(align="weights")
    prepare.main(PrepareJob(source=str(zoo), store=str(tmp_path / "store"), tokens=tokens), False)
    assert "not aligned: 4 models of architecture network-" in capsys.readouterr().out


def test_bad_files_never_stop_the_good_ones(ray_session, tmp_path: Path, capsys):
    zoo = nasty(tmp_path / "models")
    few = TokensConfig(max_architectures=2, split=[1.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"8 of 22 checkpoints cannot be used, and config field tokens\.max_skipped"):
        prepare.main(PrepareJob(source=str(zoo), storage=str(tmp_path), tokens=few), False)
    tokens = TokensConfig(max_architectures=2, split=[1.0, 0.0, 0.0], max_skipped=0.5)
    prepare.main(PrepareJob(source=str(zoo), storage=str(tmp_path), tokens=tokens), False)
    output = capsys.readouterr().out
    assert output.count("left out ") == 9 and "left out group_0/good_0.pt: has the same weights as copy/0" in output
    store = TokenStore.open(tmp_path / "stores" / "models")
    assert store.counts().checkpoints == 13 and len(store.catalog) == 22
    assert "模型" in store.models["model"].to_pylist()


def test_conditions_properties_and_thresholds_choose_checkpoints(ray_session, zoo: Path, tmp_path: Path, capsys):
    rows = [
        f"model_{model}/checkpoint_{epoch}/checkpoints,{model / 4 + epoch / 100}"
        for model in range(4)
        for epoch in (0, 1)
    ]
    (tmp_path / "table.csv").write_text("path,score\n" + "\n".join(rows) + "\n")
    tokens = TokensConfig(where="score >= quantile(score, 0.25) and epoch == 1", split=[1.0, 0.0, 0.0])
    job = PrepareJob(source=str(zoo), store=str(tmp_path / "s"), properties=str(tmp_path / "table.csv"), tokens=tokens)
    prepare.main(job, False)
    store = TokenStore.open(tmp_path / "s")
    assert store.models["id"].to_pylist() == ["model_1/1", "model_2/1", "model_3/1"]
    assert store.models["property.score"].to_pylist() == [0.26, 0.51, 0.76]
    assert len(store.skipped) == 5 and store.index["left_out"] == {"unusable": 0, "not wanted": 5, "not read": 0}
    capsys.readouterr()
    with pytest.raises(InputError, match=r"scoer.*did you mean|no record has.*scoer"):
        prepare.main(dataclasses.replace(job, tokens=TokensConfig(where="scoer > 1")), False)
    with pytest.raises(InputError, match="leaves out all 8 checkpoints"):
        prepare.main(dataclasses.replace(job, tokens=TokensConfig(where="score > 99")), False)


def test_the_public_zoos_are_listed_and_a_dry_run_downloads_nothing(tmp_path: Path):
    listed = run("--zoo", "list", cwd=tmp_path)
    assert listed.returncode == 0 and "cifar10-cnn-sample" in listed.stdout
    planned = run("--zoo", "cifar10-cnn-sample", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0 and "would download cifar10-cnn-sample" in planned.stdout
    assert list(tmp_path.iterdir()) == []
    wrong = run("--zoo", "cifar10-cnn-sampel", cwd=tmp_path)
    assert wrong.returncode == 2 and "cifar10-cnn-sample" in wrong.stderr


def test_two_sources_are_refused(tmp_path: Path):
    done = run("--source", "here", "--zoo", "mnist-cnn", cwd=tmp_path)
    assert done.returncode == 2 and "name different checkpoints: give one of them" in done.stderr


def test_help_teaches(tmp_path: Path):
    text = run("--help", cwd=tmp_path).stdout
    assert "python jobs/prepare.py --source ZOO --store STORE" in text and "--tokens.token_size" in text
