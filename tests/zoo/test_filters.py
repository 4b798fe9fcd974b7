import math

import numpy as np
import pytest

from sane_ray.errors import InputError
from sane_ray.zoo.filters import select, values_of
from sane_ray.zoo.readers import Record, Value


def record(name: str, epoch: int = 0, properties: dict[str, Value] | None = None, **config: Value) -> Record:
    return Record(f"{name}/{epoch}", name, epoch, f"/zoo/{name}", properties or {}, config, license="mit")


ZOO = [
    record(
        "a", 0, {"acc": 0.1, "loss": 2.0, "done": False, "kind": "cnn", "odd": 1}, seed=1, **{"model::nlin": "tanh"}
    ),
    record(
        "b", 5, {"acc": 0.5, "loss": 0.0, "done": True, "kind": "vit", "odd": "x"}, seed=2, **{"model::nlin": "relu"}
    ),
    record("c", 9, {"acc": 0.9, "loss": math.nan, "done": True, "kind": "cnn-l", "test-acc": 0.8}, seed=1),
    record("d", 9, {"acc": None, "loss": math.inf}, seed=2**60 + 1),
    record("e", 10),
]


def kept(where: str) -> str:
    """Names of the models that stay."""
    chosen, left_out = select(ZOO, where)
    assert sorted([r.id for r in chosen] + [r.id for r, _ in left_out]) == sorted(r.id for r in ZOO)
    return "".join(r.model for r in chosen)


def reasons(where: str) -> dict[str, str]:
    return {r.model: reason for r, reason in select(ZOO, where)[1]}


@pytest.mark.parametrize(
    ("where", "models"),
    [
        ("", "abcde"),
        ("  \n ", "abcde"),
        ("acc > 0.3", "bc"),
        ("acc >= 0.5\nand epoch >= 9", "c"),
        ("0.1 < acc <= 0.9", "bc"),
        ("not acc > 0.3", "a"),
        ("acc > 0.3 or epoch == 10", "bce"),
        ("not (acc > 0.3 and epoch < 9)", "acde"),
        ("acc != 0.5", "ac"),
        ("acc in (0.1, 0.9)", "ac"),
        ("acc not in (0.1, 0.9)", "b"),
        ("acc in [-1, +0.5]", "b"),
        ("model in ('a', 'e')", "ae"),
        ("kind == 'cnn' or matches(kind, 'v*')", "ab"),
        ("matches(kind, 'cnn*')", "ac"),
        ("not matches(kind, 'CNN*')", "abc"),
        ("kind < 'cnn-'", "a"),
        ("done", "bc"),
        ("not done", "a"),
        ("done == True", "bc"),
        ("done and kind == 'vit'", "b"),
        ("missing(acc)", "de"),
        ("isnan(loss)", "c"),
        ("loss is None", "e"),
        ("loss is not None", "abcd"),
        ("acc == None", "de"),
        ("None != acc", "abc"),
        ("missing(acc) or acc > 0.3", "bcde"),
        ("config.seed == 1", "ac"),
        ("config['seed'] == 1", "ac"),
        ("seed == 1152921504606846977", "d"),
        ("seed == 1152921504606846976", ""),
        ("config['model::nlin'] == \"tanh\"", "a"),
        ("property.acc > 0.3", "bc"),
        ("property['test-acc'] > 0.3", "c"),
        ("odd == 1", "a"),
        ("odd == 'x'", "b"),
        ("odd in (1, 'x')", "ab"),
        ("odd > 0", "a"),
        ("odd not in (1, 'x')", ""),
        ("acc - epoch / 10 > 0", "a"),
        ("1 / loss > 0.4", "a"),
        ("1 / loss >= 0", "ad"),
        ("-acc < -0.3", "bc"),
        ("seed * 2 == 4", "b"),
        ("acc >= quantile(acc, 0.5)", "bc"),
        ("acc > median(acc)", "c"),
        ("acc >= quantile(acc, 0.75)", "c"),
        ("acc + epoch >= quantile(acc + epoch, 1)", "c"),
        ("license == 'mit' and reader == 'tune'", "abcde"),
        ("split is None", "abcde"),
        ("split == 'train'", ""),
        ("True", "abcde"),
        ("1 > 2", ""),
        ("1 < 2 and 'b' in ('a', 'b')", "abcde"),
        ("id == 'a/0' or path == '/zoo/b'", "ab"),
    ],
)
def test_what_is_kept(where: str, models: str):
    assert kept(where) == models


def test_reasons_name_what_failed_or_is_missing():
    assert reasons("acc > 0.3 and loss < 1") == {
        "a": "does not meet acc > 0.3", "c": "loss is NaN", "d": "acc is missing", "e": "acc is missing",
    }  # fmt: skip
    assert reasons("1 / loss > 0") == {
        "b": "1 / loss > 0 cannot be computed", "c": "loss is NaN",
        "d": "does not meet 1 / loss > 0", "e": "loss is missing",
    }  # fmt: skip
    assert reasons("config['model::nlin'] == 'relu'")["c"] == "config['model::nlin'] is missing"
    assert reasons("kind in ('ü', 'cnn') and acc>0")["b"] == "does not meet kind in ('ü', 'cnn')"


def test_order_stays():
    chosen, left_out = select(ZOO[::-1], "acc > 0.3")
    assert [r.model for r in chosen] == ["c", "b"]
    assert [r.model for r, _ in left_out] == ["e", "d", "a"]


def test_no_records():
    assert select([], "acc > 0.3") == ([], [])


def test_one_record_without_values():
    assert select([record("x", 0, {"acc": None, "kind": None})], "acc > 1 or kind == 'x'")[0] == []


@pytest.mark.parametrize("seed", range(5))
def test_quantile_keeps_its_part_whatever_is_missing(seed: int):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=200)
    zoo = [record(str(i), 0, {"x": float(value)} if i % 3 else {"x": math.nan}) for i, value in enumerate(values)]
    chosen, _ = select(zoo, "x >= quantile(x, 0.7)")
    threshold = np.quantile([value for i, value in enumerate(values) if i % 3], 0.7)
    assert [r.model for r in chosen] == [str(i) for i, value in enumerate(values) if i % 3 and value >= threshold]


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("accc > 1", r"'accc > 1': no checkpoint has accc; did you mean acc"),
        ("nlin == 'tanh'", r'did you mean config\["model::nlin"\]'),
        ("test - acc > 0", r'no checkpoint has test; did you mean property\["test-acc"\]'),
        ("config.sede == 1", "no checkpoint has config.sede; did you mean seed"),
        ("zzz == 1", "no checkpoint has zzz; they have .*acc"),
        ("kind > 3", "kind > 3 compares text with a number: kind is 'cnn' in a/0"),
        ("3 < kind", "3 < kind compares a number with text: kind is 'cnn' in a/0"),
        ("'accuracy' > 3", "compares text with a number: 'accuracy' is 'accuracy'"),
        ("epoch in ('a', 'b')", "compares a number with text: epoch is 0 in a/0"),
        ("kind + 1 > 2", "kind \\+ 1 needs numbers, and kind is 'cnn' in a/0"),
        ("-kind > 2", "needs numbers"),
        ("acc", "acc is neither true nor false; compare it"),
        ("acc and done", "acc is neither true nor false"),
        ("matches(acc, 'x')", "needs text, and acc is 0.1 in a/0"),
        ("matches(kind, 3)", "needs a pattern"),
        ("matches(kind)", "needs 2 values"),
        ("quantile(acc, 2) > acc", "needs a number from 0 to 1"),
        ("quantile(acc, acc) > acc", "needs a number from 0 to 1"),
        ("quantile(kind, 0.5) > acc", "needs numbers, and kind is"),
        ("acc > quantile(split, 0.5)", "no checkpoint has a number there"),
        ("acc is 3", "is not allowed; compare values with"),
        ("acc > None", r"ask missing\(acc\)"),
        ("acc in kind", "kind is no list of values"),
        ("acc in ()", r"\(\) is no list of values"),
        ("acc >", "no condition \\(invalid syntax"),
        ("acc = 3", "no condition"),
        ("acc > 1; import os", "no condition"),
        ("x\x00", "no condition"),
        ("__import__('os').system('touch /tmp/ran')", "is not allowed"),
        ("acc.__class__ == 3", "no checkpoint has acc.__class__"),
        ("().__class__.__bases__[0] == 1", "is not allowed"),
        ("(lambda: 1)() == 1", "is not allowed"),
        ("[x for x in (1, 2)] == 1", "is not allowed"),
        ("f'{acc}' == '1'", "is not allowed"),
        ("9 ** 9 ** 9 > 1", "is not allowed"),
        ("acc % 2 == 1", "is not allowed"),
        ("acc if done else 3", "is not allowed"),
        ("eval('1') == 1", "is not allowed"),
        ("isnan(x=acc)", "needs 1 value in the parentheses"),
        ("1j == acc", "is not allowed"),
        ("not " * 500 + "done", "nested too deeply|no condition"),
        ("(" * 300 + "acc" + ")" * 300 + " > 1", "no condition"),
        ("acc" + "+1" * 5000 + " > 1", "nested too deeply|no condition"),
    ],
)
def test_what_is_refused(where: str, problem: str):
    with pytest.raises(InputError, match=problem) as info:
        select(ZOO, where)
    assert str(info.value).startswith("config field tokens.where is ")


MESSY = [
    record("a", 1, {"acc": "n/a", "done": "?", "kind": 3, "low": 0.1}),
    record("b", 1, {"acc": 0.5, "done": True, "kind": "cnn", "low": "none"}),
    record("c", 1, {"acc": 1, "done": False, "kind": None, "low": 0.9}),
    record("d", 1, {"acc": math.nan, "kind": "x" * 100}),
]


@pytest.mark.parametrize(
    ("where", "models", "left_out"),
    [
        ("acc > 0.3", "bc", {"a": "acc is 'n/a', no number", "d": "acc is NaN"}),
        ("not acc > 0.3", "", {"a": "acc is 'n/a', no number", "b": "does not meet not acc > 0.3"}),
        ("0.7 > acc", "b", {"a": "acc is 'n/a', no number", "c": "does not meet 0.7 > acc"}),
        ("acc == 1", "c", {"a": "acc is 'n/a', no number"}),
        ("acc != 1", "b", {"a": "acc is 'n/a', no number"}),
        ("acc != 'n/a'", "", {"a": "does not meet acc != 'n/a'", "b": "acc is 0.5, no text"}),
        ("acc > 0.3 or acc == 'n/a'", "abc", {"d": "acc is NaN"}),
        ("acc + 1 > 1.2", "bc", {"a": "acc is 'n/a', no number", "d": "acc is NaN"}),
        ("-acc < 0", "bc", {"a": "acc is 'n/a', no number"}),
        ("acc >= median(acc)", "c", {"a": "acc is 'n/a', no number", "b": "does not meet acc >= median(acc)"}),
        ("acc > low", "c", {"a": "acc is 'n/a', no number", "b": "low is 'none', no number"}),
        ("done", "b", {"a": "done is '?', no yes or no", "c": "does not meet done", "d": "done is missing"}),
        ("not done", "c", {"a": "done is '?', no yes or no"}),
        ("matches(kind, 'c*')", "b", {"a": "kind is 3, no text", "c": "kind is missing"}),
        ("kind == 3", "a", {"b": "kind is 'cnn', no number", "d": f"kind is '{'x' * 39}…, no number"}),
        ("missing(acc) or epoch == 1", "abcd", {}),
        ("epoch == 1 and acc < 0.7", "b", {"a": "acc is 'n/a', no number"}),
    ],
)
def test_a_value_of_another_kind_is_unknown(where: str, models: str, left_out: dict[str, str]):
    chosen, others = select(MESSY, where)
    assert "".join(r.model for r in chosen) == models
    found = {r.model: reason for r, reason in others}
    assert {name: found[name] for name in left_out} == left_out


def test_values_of_two_kinds_that_are_nowhere_of_one_kind_are_refused():
    zoo = [record("a", 0, {"x": "n/a", "y": 1}), record("b", 0, {"x": 2, "y": "n/a"})]
    with pytest.raises(InputError, match="x > y compares text with a number: x is 'n/a' in a/0"):
        select(zoo, "x > y")
    with pytest.raises(InputError, match="x is neither true nor false"):
        select(zoo, "x")


def test_values_of_a_name():
    assert values_of(ZOO, "acc") == [0.1, 0.5, 0.9, None, None]
    assert values_of(ZOO, "config.seed")[:2] == values_of(ZOO, "seed")[:2] == [1, 2]
    assert values_of(ZOO, "epoch") == [0, 5, 9, 9, 10]
    with pytest.raises(InputError, match="no checkpoint has sed; did you mean seed"):
        values_of(ZOO, "sed")


def test_a_property_comes_before_a_setting_and_that_before_a_field():
    zoo = [Record("a/1", "a", 1, "/a", {"x": 1}, {"x": 2, "epoch": 7})]
    assert (values_of(zoo, "x"), values_of(zoo, "config.x"), values_of(zoo, "epoch")) == ([1], [2], [7])
