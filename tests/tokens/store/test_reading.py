"""Reading a token store, and refusing one that is not whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.tokens.store import SPLITS, TokenStore
from sane_ray.tokens.store.reading import as_float32, to_stored


@pytest.fixture
def copy(shared_store: TokenStore, tmp_path: Path) -> Path:
    """A copy of the shared store, to be damaged."""
    return Path(shutil.copytree(shared_store.path, tmp_path / "copy"))


def first_part(store: Path) -> Path:
    return min(store.glob("tokens/split=train/*.parquet"))


def test_row_groups_give_views_of_one_buffer(shared_store: TokenStore):
    for split in SPLITS:
        for group in shared_store.row_groups(split):
            values = shared_store.read_row_group(group)
            assert tuple(segment for segment, _ in values) == group.segments
            for (ordinal, first, tokens), tokens_NT in values:
                assert (first, tokens) == (0, 19)
                assert tokens_NT.shape == (19, 17) and tokens_NT.dtype == np.float16
                assert torch.equal(torch.from_numpy(tokens_NT.astype(np.float32)), shared_store.tokens(ordinal))
                assert tokens_NT.base is not None and not tokens_NT.flags.owndata
    addresses = [tokens_NT.__array_interface__["data"][0] for _, tokens_NT in values]
    assert np.diff(addresses).tolist() == [19 * 17 * 2] * (len(values) - 1)


def test_counts_add_up(shared_store: TokenStore):
    parts, whole = [shared_store.counts(split) for split in SPLITS], shared_store.counts()
    for name in ("models", "checkpoints", "tokens", "parameters", "row_groups"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    assert (whole.models, whole.checkpoints, whole.tokens) == (10, 20, 20 * 19)
    assert shared_store.num_bytes == sum(
        path.stat().st_size for path in shared_store.path.rglob("*.parquet") if path.is_file()
    )


def test_an_unknown_split_is_refused(shared_store: TokenStore):
    with pytest.raises(InputError, match="split is 'valid': it must be one of train, val, test"):
        shared_store.row_groups("valid")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_values_and_back(dtype: str):
    tokens_NT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    stored = to_stored(tokens_NT, dtype)
    assert stored.dtype.byteorder in "<=" and stored.dtype.itemsize == getattr(torch, dtype).itemsize
    assert torch.equal(as_float32(stored, dtype), tokens_NT.to(getattr(torch, dtype)).float())


def test_reading_needs_no_ray(shared_store: TokenStore):
    code = (
        "import sys; from sane_ray.tokens.store import TokenStore; "
        f"store = TokenStore.open({str(shared_store.path)!r}); store.state_dict(3); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_no_store(tmp_path: Path):
    with pytest.raises(InputError, match=r"--store .*nowhere does not exist: write it with `python jobs/prepare\.py"):
        TokenStore.open(tmp_path / "nowhere")


def test_another_format_version(copy: Path):
    index = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(InputError, match=r"format version 99, this sane_ray reads version 2: delete .* and run"):
        TokenStore.open(copy)


def test_another_kind_of_index(copy: Path):
    (copy / "store.json").write_text("{}")
    with pytest.raises(InputError, match="not the index of a sane_ray token store"):
        TokenStore.open(copy)


def test_a_damaged_index(copy: Path):
    (copy / "store.json").write_text((copy / "store.json").read_text()[:1000])
    with pytest.raises(InputError, match=r"store\.json: damaged .* delete .* and run"):
        TokenStore.open(copy)


def test_a_missing_file(copy: Path):
    path = first_part(copy)
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name} is missing: the store is damaged; delete .* and run jobs"):
        TokenStore.open(copy)


def test_a_truncated_file(copy: Path):
    path = first_part(copy)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"{path.name} has {size - 10} bytes instead of {size}"):
        TokenStore.open(copy)


def test_a_changed_table_of_models(copy: Path):
    content = bytearray((copy / "models.parquet").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (copy / "models.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"models\.parquet has changed since it was written"):
        TokenStore.open(copy)


def test_a_token_file_overwritten_with_as_many_bytes(copy: Path):
    path = first_part(copy)
    path.write_bytes(b"x" * path.stat().st_size)
    store = TokenStore.open(copy)
    with pytest.raises(InputError, match=rf"{path.name}: damaged .* delete .* and run jobs/prepare\.py again"):
        store.read_row_group(store.row_groups("train")[0])


def test_a_row_group_with_too_few_tokens(copy: Path):
    path = first_part(copy)
    rows = pq.read_table(path, partitioning=None)
    pq.write_table(rows.slice(0, 3), path)
    index = json.loads((copy / "store.json").read_text())
    for file in index["files"]:
        if file["path"] == str(path.relative_to(copy)):
            file["bytes"] = path.stat().st_size
    (copy / "store.json").write_text(json.dumps(index))
    store = TokenStore.open(copy)
    with pytest.raises(InputError, match="row group 0 has 3 tokens instead of"):
        store.read_row_group(store.row_groups("train")[0])
