import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sane_ray.tokens.normalization import LayerStatistics
from sane_ray.tokens.store.inspection import BATCH_BYTES, BATCH_CHECKPOINTS, batches, inspect_batch, weights_digest
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table, tokenize
from sane_ray.zoo.checkpoint import load_state_dict

SETTINGS = {"token_size": 0, "batch_norm": "keep"}


def test_batches_are_bounded_in_number_and_bytes_and_leave_nothing_out():
    sizes = [1000] * 100 + [int(BATCH_BYTES)] * 2 + [1000]
    work = batches([str(position) for position in range(len(sizes))], sizes)
    assert [path for batch in work for path in batch["paths"]] == [str(position) for position in range(len(sizes))]
    assert [batch["first"] for batch in work] == [0, BATCH_CHECKPOINTS, 100, 101, 102]


def test_a_batch_says_what_each_checkpoint_is(new_zoo: Callable):
    zoo = new_zoo(models=2, epochs=1)
    paths = [str(path) for path in sorted(zoo.path.rglob("checkpoints"))]
    result = json.loads(json.dumps(inspect_batch({"first": 7, "paths": [*paths, "/nowhere"]}, SETTINGS)))
    weights = load_state_dict(paths[1])
    table = build_layer_table(weights)
    seen = result["checkpoints"][1]
    assert result["first"] == 7 and seen["key"] == table.fingerprint and seen["sha256"] == weights_digest(weights)
    assert LayerTable.from_dict(result["tables"][table.fingerprint]) == table
    expected = LayerStatistics().update(tokenize(weights, table), table)
    assert seen["statistics"] == expected.to_dict()
    assert result["checkpoints"][2] == {
        "sha256": "",
        "reason": "no such checkpoint file; check the path, or prepare again from a complete zoo",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, dtype: torch.dtype, value: float):
    torch.save({"a.weight": torch.ones(2, 2), "b.bias": torch.tensor([1.0, value], dtype=dtype)}, tmp_path / "c")
    (seen,) = inspect_batch({"first": 0, "paths": [str(tmp_path / "c")]}, SETTINGS)["checkpoints"]
    assert seen["reason"] == "b.bias holds NaN or infinite values" and len(seen["sha256"]) == 64


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
