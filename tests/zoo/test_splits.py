import hashlib
import json
import logging
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.splits import SPLITS, assign_splits, split_groups


def zoo(models: int, epochs: int = 1, **config: Value) -> list[Record]:
    return [
        Record(f"m{model}/{epoch}", f"m{model}", epoch, f"/zoo/m{model}/{epoch}.pt", config=config)
        for model in range(models)
        for epoch in range(epochs)
    ]


def split(records: list[Record], **config: object) -> dict[str, str]:
    return assign_splits(records, TokensConfig(**config))


class TestByModel:
    def test_all_epochs_of_a_model_are_one_entry(self):
        assert list(split(zoo(30, epochs=3))) == [f"m{model}" for model in range(30)]

    @pytest.mark.parametrize("fractions", [[0.7, 0.15, 0.15], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    def test_fractions_are_right_to_within_chance(self, fractions: list[float]):
        counts = Counter(split(zoo(5000), split=fractions, seed=3).values())
        for name, fraction in zip(SPLITS, fractions, strict=True):
            assert abs(counts[name] - 5000 * fraction) <= 4 * math.sqrt(5000 * fraction * (1 - fraction))

    @pytest.mark.parametrize("seed", range(5))
    def test_models_that_come_or_go_move_no_other(self, seed: int):
        rng = np.random.default_rng(seed)
        records = zoo(400)
        before = split(records, seed=seed)
        for _ in range(5):
            some = [records[index] for index in rng.permutation(400)[: int(rng.integers(100, 400))]]
            after = split(some, seed=seed)
            assert after == {record.model: before[record.model] for record in some}

    def test_the_seed_and_nothing_else_decides(self):
        assert split(zoo(200), seed=1) == split(zoo(200)[::-1], seed=1)
        assert split(zoo(200), seed=1) != split(zoo(200), seed=2)

    def test_a_known_split_stays_as_it_is(self):
        numbers = {"m0": 0.932, "m1": 0.648, "m2": 0.072, "m3": 0.275, "m4": 0.911}  # sha256 of 0:m0, 0:m1, ...
        splits = split(zoo(400), split=[0.65, 0.28, 0.07])
        assert {model: splits[model] for model in numbers} == {
            "m0": "test", "m1": "train", "m2": "train", "m3": "train", "m4": "val",
        }  # fmt: skip


class TestSmallZoos:
    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("models", [3, 4, 7])
    def test_no_split_stays_empty(self, models: int, seed: int):
        assert set(split(zoo(models), seed=seed).values()) == set(SPLITS)

    @pytest.mark.parametrize("seed", range(10))
    def test_training_is_served_first(self, seed: int):
        assert list(split(zoo(1), seed=seed).values()) == ["train"]
        assert Counter(split(zoo(2), seed=seed).values())["train"] == 1

    @pytest.mark.parametrize("seed", range(10))
    def test_a_split_of_no_fraction_stays_empty(self, seed: int):
        assert "test" not in split(zoo(5), seed=seed, split=[0.5, 0.5, 0.0]).values()
        assert set(split(zoo(3), seed=seed, split=[1.0, 0.0, 0.0]).values()) == {"train"}

    @pytest.mark.parametrize("fractions", [[0.1, 0.2, 0.7], [0.01, 0.0, 0.99], [0.001, 0.998, 0.001]])
    @pytest.mark.parametrize("models", [1, 2, 3, 60])
    def test_there_is_something_to_train_on_whatever_the_fractions(self, fractions: list[float], models: int):
        for seed in range(20):
            counts = Counter(split(zoo(models), seed=seed, split=fractions).values())
            assert counts["train"] > 0 and counts.total() == models
            positive = sum(fraction > 0 for fraction in fractions)
            assert len(counts) == min(models, positive)

    @pytest.mark.parametrize("models", [8, 20, 40])
    def test_fractions_are_met_exactly(self, models: int):
        for seed in range(20):
            counts = Counter(split(zoo(models), seed=seed, split=[0.5, 0.25, 0.25]).values())
            assert counts == {"train": models // 2, "val": models // 4, "test": models // 4}

    def test_one_more_model_moves_at_most_one_at_each_border(self):
        for seed in range(50):
            small, large = split(zoo(20), seed=seed), split(zoo(21), seed=seed)
            assert sum(small[model] != large[model] for model in small) <= 2

    def test_the_nearest_model_moves_to_an_empty_split(self):
        groups = {f"m{model}" for model in range(300)}
        for seed in range(20):
            without = split_groups(groups, [0.7, 0.3, 0.0], seed)
            moved = split_groups(groups, [0.7, 0.3 - 1e-9, 1e-9], seed)
            (model,) = [group for group in groups if without[group] != moved[group]]
            assert moved[model] == "test"
            last = max(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())
            assert model == last  # the largest number is next to the last interval

    def test_the_order_of_the_groups_does_not_count(self):
        names = [f"m{model}" for model in range(30)]
        assert split_groups(names, [0.7, 0.15, 0.15], 0) == split_groups(set(names), [0.7, 0.15, 0.15], 0)

    def test_beyond_small_zoos_no_model_moves(self):
        small, large = split(zoo(41), seed=5), split(zoo(300), seed=5)
        assert all(small[model] == large[model] for model in small)


class TestByProperty:
    def test_equal_values_stay_together(self):
        records = [r for seed in range(50) for r in zoo(50, epochs=2, seed=seed)[seed * 2 : seed * 2 + 2]]
        records += [Record(f"n{seed}/0", f"n{seed}", 0, "/n", config={"seed": float(seed)}) for seed in range(50)]
        splits = split(records, split_by="config.seed")
        assert all(splits[f"m{seed}"] == splits[f"n{seed}"] for seed in range(50))
        assert set(splits.values()) == set(SPLITS)

    def test_names_of_splits_are_the_split(self):
        names = ["train", "Valid", "validation", "test", "val"]
        records = [Record(f"{i}/0", str(i), 0, "/x", {"part": name}) for i, name in enumerate(names)]
        assert list(split(records, split_by="part").values()) == ["train", "val", "val", "test", "val"]

    def test_field_of_the_record(self):
        records = [Record(f"{i}/0", str(i), 0, "/x", license="abc"[i % 3]) for i in range(9)]
        splits = split(records, split_by="license")
        assert all(splits[str(i)] == splits[str(i % 3)] for i in range(9))

    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ([1, None], r"split_by is 'x', and m1/0 has no such value"),
            ([1, math.nan], r"m1/0 has no such value"),
            ([None, None], r"m0/0 has no such value"),
        ],
    )
    def test_missing_value(self, values: list[Value], problem: str):
        records = [Record(f"m{i}/0", f"m{i}", 0, "/x", {"x": value}) for i, value in enumerate(values)]
        with pytest.raises(InputError, match=problem):
            split(records, split_by="x")

    def test_unknown_property(self):
        with pytest.raises(
            InputError, match=r"split_by is 'config.sed': no checkpoint has config.sed; did you mean seed"
        ):
            split(zoo(3, seed=1), split_by="config.sed")

    def test_value_that_changes_while_training(self):
        records = [Record(f"m/{epoch}", "m", epoch, "/x", {"acc": epoch / 10}) for epoch in range(2)]
        with pytest.raises(InputError, match=r"checkpoints of model m differ in it \(0.0, 0.1\)"):
            split(records, split_by="acc")


class TestPublished:
    def test_the_split_of_the_zoo_counts_and_others_are_left_out(self):
        parts = ["train", None, "test", "val"]
        records = [Record(f"m{i}/{e}", f"m{i}", e, "/x", split=part) for i, part in enumerate(parts) for e in (0, 1)]
        assert split(records, split_by="published") == {"m0": "train", "m2": "test", "m3": "val"}

    def test_zoo_without_one(self):
        with pytest.raises(InputError, match="this zoo comes with no split"):
            split(zoo(3), split_by="published")

    def test_one_model_in_two_splits(self):
        records = [Record(f"m/{e}", "m", e, "/x", split=part) for e, part in enumerate(["train", "test"])]
        with pytest.raises(InputError, match="the published split of m/1 is test, and another puts model m into train"):
            split(records, split_by="published")


class TestFile:
    def write(self, folder: Path, name: str, content: object) -> str:
        path = folder / name
        if name.endswith(".parquet"):
            pq.write_table(pa.table(content), path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("s.csv", "model,split\nm0,train\nm1,validation\nm2,TEST\n"),
            ("s.csv", "split,id\ntrain,m0/0\nvalid,m1/0\ntest,m2/0\n"),
            ("s.json", {"m0": "train", "m1": "val", "m2": "test"}),
            ("s.json", {"train": ["m0"], "val": ["m1"], "test": ["m2"]}),
            ("s.json", {"train": {"path": ["m0"], "score": [1]}, "val": {"path": ["m1"]}, "test": {"path": ["m2"]}}),
            ("s.json", {"train": ["/far/zoo/m0/check/c.pt"], "val": ["zoo/m1/c/0"], "test": ["m2/x.pt", "m2/y.pt"]}),
            ("s.json", {"train": ["old\\m0.pt"], "valid": ["m1.safetensors"], "test": ["/a/m2.pt.tar"]}),
            ("s.parquet", {"model": ["m0", "m1", "m2"], "split": ["train", "val", "test"]}),
            ("s.parquet", {"path": ["z/m0/0.pt", "z/m1/0.pt", "z/m2/0.pt"], "split": ["train", "val", "test"]}),
        ],
    )
    def test_forms(self, tmp_path: Path, name: str, content: object):
        path = self.write(tmp_path, name, content)
        assert split(zoo(4, epochs=2), split_file=path, split_by="published") == {
            "m0": "train",
            "m1": "val",
            "m2": "test",
        }

    def test_models_that_are_not_there_are_counted(self, tmp_path: Path, caplog):
        path = self.write(tmp_path, "s.json", {"train": ["m0", "x1", "x2/m1"]})
        with caplog.at_level(logging.WARNING):
            assert split(zoo(3), split_file=path) == {"m0": "train"}
        assert "2 names of no model of the zoo, for example x1" in caplog.text
        assert "2 models of the zoo are not in it" in caplog.text

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            (
                "s.csv",
                "model,part\nm0,train\n",
                "has columns model, part; make it a table with columns model and split",
            ),
            ("s.csv", "model,split\nm0,\n", "a row has no split"),
            ("s.csv", "model,split\nm0,dev\n", "the split of m0 is 'dev'; make it train, val or test"),
            (
                "s.csv",
                "model,split\nm0,train\nm0,val\n",
                "the split of m0 is val, and another puts model m0 into train",
            ),
            (
                "s.csv",
                "model,split\nx,train\n",
                "names none of the zoo's 3 models; it has 'x' where a model is called 'm0'",
            ),
            ("s.json", "[1, 2]", "holds a list; make it"),
            ("s.json", "{}", "holds a dict; make it"),
            ("s.json", '{"train": 3}', "train holds a int"),
            ("s.json", '{"train": ["m0"', "not readable JSON"),
            (
                "s.json",
                {"train": ["m0/1"], "test": ["m0/2"]},
                "the split of m0/2 is test, and another puts model m0 into",
            ),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path: Path, name: str, content: object, problem: str):
        with pytest.raises(InputError, match=problem):
            split(zoo(3), split_file=self.write(tmp_path, name, content))

    @pytest.mark.parametrize("name", ["none.json", "none.csv"])
    def test_file_that_is_not_there(self, tmp_path: Path, name: str):
        with pytest.raises(InputError, match=r"none\.\w+: no such"):
            split(zoo(3), split_file=str(tmp_path / name))
