import dataclasses
import pickle

import numpy as np
import pytest

from sane_ray.finetuning.evaluation import METRICS, Histories, Piece
from sane_ray.finetuning.records import Records
from sane_ray.zoo.images import load_images


def piece(recipe, seed=0, **changes):
    values = np.random.default_rng(seed).normal(size=(2, 6)).astype(np.float32)
    return Piece([{**recipe, "seed": 1, **changes}] * 2, {"a": values, "b": values[:, :2]})


@pytest.fixture
def histories():
    rng = np.random.default_rng(0)
    metrics = rng.normal(size=(2, 3, len(METRICS)))
    metrics[0, 1, 0] = np.nan
    return Histories(metrics, rng.normal(size=(2, 2, 5, 10)).astype(np.float16))


def test_same_work_is_found_again(recipe, digits, histories, tmp_path):
    Records(tmp_path / "new", digits, 2, [0, 2]).keep(
        Records(tmp_path, digits, 2, [0, 2]).key(piece(recipe)), histories
    )
    again = Records(tmp_path / "new", load_images("digits", seed=0), 2, (0, 2))
    found = again.load(again.key(piece(recipe)))
    assert found is not None
    np.testing.assert_array_equal(found.metrics_REM, histories.metrics_REM)
    np.testing.assert_array_equal(found.logits_RTIC, histories.logits_RTIC)
    assert found.logits_RTIC.dtype == np.float16
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_the_order_of_keys_and_the_layout_in_memory_do_not_matter(recipe, digits, tmp_path):
    records, one = Records(tmp_path, digits, 2, [0]), piece(recipe)
    turned = Piece(
        [dict(reversed(params.items())) for params in one.params],
        {key: np.asfortranarray(value) for key, value in reversed((one.weights or {}).items())},
    )
    assert records.key(turned) == records.key(one)


def test_other_work_is_not(recipe, digits, tmp_path):
    one = piece(recipe)
    assert one.weights is not None
    nudged = {**one.weights, "a": np.nextafter(one.weights["a"], 9, dtype=np.float32)}
    others = [
        piece(recipe, seed=1),
        Piece([one.params[0], {**one.params[1], "seed": 2}], one.weights),
        piece(recipe, **{"optim::lr": 1e-2}),
        Piece(one.params[:1], one.weights),
        Piece(one.params, None),
        Piece(one.params, nudged),
        Piece(one.params, {**one.weights, "b": one.weights["b"].astype(np.float64)}),
        Piece(one.params, {"b": one.weights["a"], "a": one.weights["b"]}),
        Piece(one.params, {**one.weights, "a": one.weights["a"].reshape(2, 3, 2)}),
    ]
    other_images = dataclasses.replace(digits, fingerprint="0" * 16)
    other_records = [
        Records(tmp_path, other_images, 2, [0]),
        Records(tmp_path, load_images("digits", seed=1), 2, [0]),  # the same images, split in another way
        Records(tmp_path, digits, 3, [0]),
        Records(tmp_path, digits, 2, [0, 1]),
    ]
    records = Records(tmp_path, digits, 2, [0])
    keys = [records.key(one), *map(records.key, others), *(other.key(one) for other in other_records)]
    assert len(set(keys)) == len(keys)


def test_files_cut_short_are_done_again(recipe, digits, histories, tmp_path):
    records = Records(tmp_path, digits, 2, [0])
    key = records.key(piece(recipe))
    assert records.load(key) is None
    records.keep(key, histories)
    whole = (tmp_path / f"{key}.npz").read_bytes()
    for size in [0, 1, 4, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        (tmp_path / f"{key}.npz").write_bytes(whole[:size])
        assert records.load(key) is None, size
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / f"{key}.npz").write_bytes(flipped)
    assert records.load(key) is None
    records.keep(key, histories)
    assert records.load(key) is not None


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(recipe, digits, tmp_path):
    records = Records(tmp_path, digits, 2, [0])
    key = records.key(piece(recipe))
    with (tmp_path / f"{key}.npz").open("wb") as file:
        np.savez(file, metrics=np.array([Trap()], dtype=object), logits=np.zeros(1))
    assert records.load(key) is None
    (tmp_path / f"{key}.npz").write_bytes(pickle.dumps(Trap()))
    assert records.load(key) is None
    with (tmp_path / f"{key}.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert records.load(key) is None


def test_a_full_disk_leaves_nothing_half_written(recipe, digits, histories, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    records = Records(tmp_path, digits, 2, [0])
    with pytest.raises(OSError, match="no space"):
        records.keep(records.key(piece(recipe)), histories)
    assert not any(tmp_path.iterdir())
