from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sane_ray.tokens.normalization import LayerStatistics
from sane_ray.tokens.store import inspection
from sane_ray.tokens.store.inspection import (
    BATCH_BYTES,
    BATCH_CHECKPOINTS,
    Batch,
    batches,
    describe,
    inspect_batch,
    inspect_share,
    shares,
    slices_of,
    weights_digest,
)
from sane_ray.tokens.tokenizer import build_layer_table, tokenize
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.checkpoint import load_state_dict
from sane_ray.zoo.readers import Record

SETTINGS = {"token_size": 0, "batch_norm": "keep"}


def record(path: str | Path) -> Record:
    return Record("a/0", "a", 0, str(path))


def test_batches_are_bounded_in_number_and_bytes_and_leave_nothing_out():
    sizes = [1000] * (BATCH_CHECKPOINTS + 2) + [int(BATCH_BYTES)] * 2 + [1000]
    records = [record(str(position)) for position in range(len(sizes))]
    work = batches(records, sizes)
    assert [one for batch in work for one in batch.records] == records
    more = BATCH_CHECKPOINTS + 2
    assert [batch.first for batch in work] == [0, BATCH_CHECKPOINTS, more, more + 1, more + 2]
    assert batches([], []) == []


def test_a_batch_says_what_each_checkpoint_is(new_zoo: Callable):
    records = discover(new_zoo(models=2, epochs=1).path)
    seen, tables = inspect_batch(Batch(7, [*records, record("/nowhere")]), SETTINGS)
    weights = load_state_dict(records[1].path)
    table = build_layer_table(weights)
    assert seen[1].key == table.fingerprint and seen[1].sha256 == weights_digest(weights) and not seen[1].reason
    assert tables == {table.fingerprint: table}
    expected = LayerStatistics().update(tokenize(weights, table), table)
    rows = (expected.mean, expected.variance, expected.norm, expected.minimum, expected.maximum)
    assert np.allclose(seen[1].statistics, np.stack(rows), rtol=1e-12, atol=0)
    assert seen[2].sha256 == "" and seen[2].reason.startswith("no such checkpoint file; check the path")


def test_the_largest_weight_is_told_without_running_statistics(tmp_path: Path):
    norm = {name: torch.full((2,), 1e6) for name in ("n.running_mean", "n.running_var")}
    weights = {"a.weight": torch.tensor([[1.0, -3.0]]), "a.bias": torch.ones(1), "n.weight": torch.ones(2), **norm}
    torch.save({**weights, "n.num_batches_tracked": torch.tensor(10**9)}, tmp_path / "c")
    ((seen,), _) = inspect_batch(Batch(0, [record(tmp_path / "c")]), SETTINGS)
    assert seen.largest == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, dtype: torch.dtype, value: float):
    torch.save({"a.weight": torch.ones(2, 2), "b.bias": torch.tensor([1.0, value], dtype=dtype)}, tmp_path / "c")
    ((seen,), _) = inspect_batch(Batch(0, [record(tmp_path / "c")]), SETTINGS)
    assert seen.reason == "b.bias holds NaN or infinite values" and len(seen.sha256) == 64


def test_a_large_checkpoint_is_the_same_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspection, "SLICE_BYTES", 64)
    monkeypatch.setattr(inspection, "BATCH_BYTES", 200)
    weights = {"a.weight": torch.randn(9, 7), "a.bias": torch.randn(9), "b.weight": torch.randn(5, 3).half()}
    weights |= {"count": torch.tensor(3), "empty": torch.empty(0)}
    save_file(weights, tmp_path / "c.safetensors")
    one = Record("c", "c", 0, str(tmp_path / "c.safetensors"), reader="files")
    meta = inspection.open_record(one).meta
    work = shares(0, one, meta)
    assert len(work) > 1 and [piece for share in work for piece in share.slices] == slices_of(meta)
    glances = [glance for share in work for glance in inspect_share(share)]
    seen = describe(meta, glances, SETTINGS, {})
    ((whole,), _) = inspect_batch(Batch(0, [one]), SETTINGS)
    assert seen.sha256 == whole.sha256 == weights_digest({key: weights[key] for key in meta})
    assert np.array_equal(seen.statistics, whole.statistics) and seen.key == whole.key


def test_a_share_of_a_file_that_vanished_says_so(tmp_path: Path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "c.safetensors")
    one = Record("c", "c", 0, str(tmp_path / "c.safetensors"), reader="files")
    (share,) = shares(0, one, inspection.open_record(one).meta)
    (tmp_path / "c.safetensors").unlink()
    assert "no such checkpoint file" in inspect_share(share)


def test_the_digest_is_of_the_weights_not_of_the_file(tmp_path: Path):
    weights = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}
    save_file(weights, tmp_path / "c.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "c.pt")
    digests = {weights_digest(load_state_dict(tmp_path / name)) for name in ("c.safetensors", "c.pt")}
    assert digests == {weights_digest(weights)}


def test_the_digest_sees_every_difference():
    value = torch.arange(6.0).reshape(3, 2)
    variants = [{"a": value}, {"b": value}, {"a": value + 1}, {"a": value.reshape(2, 3)}, {"a": value.double()}]
    variants += [{"a": value, "count": torch.tensor(1)}, {"a": value, "count": torch.tensor(2)}]
    assert len({weights_digest(variant) for variant in variants}) == len(variants)
    assert weights_digest({"a": value.t().contiguous().t()}) == weights_digest({"a": value})
