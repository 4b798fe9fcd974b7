import itertools

import numpy as np
import pytest

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store import SPLITS, Architecture
from sane_ray.tokens.store.layout import Row, allocate, check_splits, plan
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.tokens.tokenizer import Layer, LayerTable
from sane_ray.zoo.catalog import Record

TABLE = LayerTable(40, (Layer("weight", (50, 40), "linear", None, 50, 40, 50),), ())
ARCHITECTURE = Architecture("a", TABLE, Symmetry({}, {}), Normalization("none", np.zeros(1), np.ones(1)))
BYTES = 50 * (40 * 2 + 5 * 4)


def rows(models: int, epochs: int) -> list[Row]:
    members = itertools.product(range(models), range(epochs))
    return [
        Row(number, number, Record(f"{m}/{e}", str(m), e, ""), "", SPLITS[m % 3], ARCHITECTURE)
        for number, (m, e) in enumerate(members)
    ]


@pytest.mark.parametrize("fractions", [[0.7, 0.15, 0.15], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.98, 0.01, 0.01]])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20, 101, 1000])
def test_allocation_adds_up_fills_every_split_and_is_near_the_fractions(count: int, fractions: list[float]):
    counts = allocate(count, fractions)
    wanted = sum(fraction > 0 for fraction in fractions)
    assert sum(counts) == count if count >= wanted else sum(counts) == min(count, wanted)
    assert all(number == 0 for number, fraction in zip(counts, fractions, strict=True) if fraction == 0)
    if count >= wanted:
        assert all(number > 0 for number, fraction in zip(counts, fractions, strict=True) if fraction > 0)
    if count * min(fraction for fraction in fractions if fraction > 0) >= 1:
        assert all(abs(number - count * fraction) < 1 for number, fraction in zip(counts, fractions, strict=True))


def test_exact_fractions_are_met_exactly():
    assert allocate(20, [0.7, 0.15, 0.15]) == [14, 3, 3] and allocate(10, [0.7, 0.2, 0.1]) == [7, 2, 1]


def test_empty_splits_are_refused_only_where_models_were_asked_for():
    check_splits([3, 0, 0], TokensConfig(split=[1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="but 3 usable models leave none for val, test"):
        check_splits([3, 0, 0], TokensConfig())


def test_row_groups_and_files_have_the_size_asked_for():
    config = TokensConfig(row_group_mb=4 * BYTES / 1e6, file_mb=12 * BYTES / 1e6)
    parts = plan(rows(30, 5), config)
    assert [part.file for part in parts[:2]] == [f"tokens/split=train/part-0000{i}.parquet" for i in (0, 1)]
    for split in SPLITS:
        groups = [group for part in parts if f"={split}/" in part.file for group in part.groups]
        assert [len(group) for group in groups] == [4] * 12 + [2]
        assert {row.split for group in groups for row in group} == {split}
    assert sorted(len(part.groups) for part in parts) == [1, 1, 1] + [3] * 12
    assert sorted(row.ordinal for part in parts for group in part.groups for row in group) == list(range(150))


def test_a_checkpoint_larger_than_a_row_group_stands_alone():
    parts = plan(rows(3, 2), TokensConfig(row_group_mb=1e-6, file_mb=1e-6))
    assert [[len(group) for group in part.groups] for part in parts] == [[1]] * 6


def test_the_order_mixes_models_and_comes_from_the_seed():
    def order(seed: int) -> list[str]:
        return [row.record.model for row in plan(rows(30, 5), TokensConfig(seed=seed))[0].groups[0]]

    assert order(0) == order(0) != order(1)
    assert sum(one == other for one, other in itertools.pairwise(order(0))) < 15  # stored model by model it would be 40
