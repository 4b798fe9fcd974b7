import itertools

import numpy as np
import pytest
import torch

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store import SPLITS, Architecture
from sane_ray.tokens.store.inspection import Found, Seen
from sane_ray.tokens.store.layout import Row, arrange, check_splits, hints, plan
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.catalog import Record

TABLE = build_layer_table({"weight": torch.zeros(50, 40)})
ARCHITECTURE = Architecture("a", TABLE, Symmetry({}, {}), Normalization("none", np.zeros(1), np.ones(1)))
BYTES = 50 * (40 * 2 + 5 * 4)


def rows(models: int, epochs: int) -> list[Row]:
    members = itertools.product(range(models), range(epochs))
    return [
        Row(number, number, Record(f"{m}/{e}", str(m), e, ""), "", SPLITS[m % 3], ARCHITECTURE)
        for number, (m, e) in enumerate(members)
    ]


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
        assert {row.split for group in groups for piece in group for row in [piece.row]} == {split}
    assert sorted(len(part.groups) for part in parts) == [1, 1, 1] + [3] * 12
    assert sorted(piece.row.ordinal for part in parts for group in part.groups for piece in group) == list(range(150))


def test_a_checkpoint_larger_than_a_row_group_stands_alone():
    parts = plan(rows(3, 2), TokensConfig(row_group_mb=1e-6, file_mb=1e-6))
    assert [[len(group) for group in part.groups] for part in parts] == [[1]] * 6


def test_a_large_checkpoint_is_cut_into_even_segments_of_about_a_row_group():
    config = TokensConfig(row_group_mb=0.3 * BYTES / 1e6, segment_mb=0.9 * BYTES / 1e6, file_mb=0.6 * BYTES / 1e6)
    groups = [group for part in plan(rows(3, 1), config) for group in part.groups]
    assert all(len(group) == 1 for group in groups) and len(groups) == 3 * 4
    for ordinal in range(3):
        pieces = [(piece.first, piece.tokens) for (piece,) in groups if piece.row.ordinal == ordinal]
        assert pieces == [(0, 12), (12, 13), (25, 12), (37, 13)]


def test_a_checkpoint_up_to_the_segment_size_stays_whole():
    config = TokensConfig(row_group_mb=0.3 * BYTES / 1e6, segment_mb=BYTES / 1e6)
    assert [[piece.tokens for piece in group] for part in plan(rows(3, 1), config) for group in part.groups] == [
        [50]
    ] * 3


def test_the_order_mixes_models_and_comes_from_the_seed():
    def order(seed: int) -> list[str]:
        return [piece.row.record.model for piece in plan(rows(30, 5), TokensConfig(seed=seed))[0].groups[0]]

    assert order(0) == order(0) != order(1)
    assert sum(one == other for one, other in itertools.pairwise(order(0))) < 15  # stored model by model it would be 40


def test_heads_are_told_apart_only_where_all_models_have_as_many():
    def of(**config: object) -> Record:
        return Record("a/0", "a", 0, "", config=config)

    four = of(num_attention_heads=4, seed=1, kind="CNN")
    assert hints([four, of(num_attention_heads=4, seed=2, kind="CNN")]) == {"num_attention_heads": 4, "kind": "CNN"}
    assert hints([four, of(num_attention_heads=8, seed=2, kind="CNN")]) == {"kind": "CNN"}
    assert hints([four, of(seed=1)]) == {"seed": 1}
    assert hints([four, of(num_attention_heads=4, position="alibi", seed=1)]) == {"seed": 1}


def test_a_checkpoint_that_does_not_fit_the_format_does_not_count_in_the_statistics():
    table = build_layer_table({"weight": torch.zeros(50, 40)})
    records = [Record(f"{number}/0", str(number), 0, f"/{number}") for number in range(6)]

    def seen(number: int, mean: float, largest: float) -> Seen:
        return Seen(
            str(number), "", table.fingerprint, np.array([[mean], [1.0], [1.0], [-largest], [largest]]), largest
        )

    config = TokensConfig(split=[1.0, 0.0, 0.0], max_skipped=0.2)
    good = Found.nothing(records[:5])
    good.add(range(5), [seen(number, 0.5, 3.0) for number in range(5)], {table.fingerprint: table})
    with_wild = Found.nothing(records)
    with_wild.add(
        range(6), [*(seen(number, 0.5, 3.0) for number in range(5)), seen(5, 9.0, 1e9)], {table.fingerprint: table}
    )
    (rows_of_good, (expected,)), (kept, (found,)) = arrange(good, config), arrange(with_wild, config)
    assert [row.record.id for row in kept] == [row.record.id for row in rows_of_good]
    assert "weight reaches 1e+09 after normalisation, too large for float16" in with_wild.reasons[5]
    assert found.normalization == expected.normalization and found.normalization.shift.tolist() == [0.5]
