"""Whatever stands in the small files beside weights, listing a zoo gives records, or one sentence that refuses it."""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.zoo.catalog import Record, discover, join_properties, read_catalog, write_catalog
from sane_ray.zoo.filters import select
from sane_ray.zoo.splits import assign_splits

WEIGHTS = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
LAYOUT = 'varname,start_idx,end_idx,shape\na/kernel:0,0,4,"(2, 2)"\na/bias:0,4,6,"(2,)"\n'
METRICS = "step,modeldir,test_accuracy,train_accuracy,config.seed\n0,m,1,1,3\n86,m,0.5,1,3\n"


def tune(root: Path) -> Path:
    model = root / "finetuning" / "base" / "m"
    (model / "checkpoint_000001").mkdir(parents=True)
    torch.save(WEIGHTS, model / "checkpoint_000001" / "checkpoints")
    return model


def huggingface(root: Path) -> Path:
    model = root / "m"
    (model / "checkpoint-5").mkdir(parents=True)
    save_file(WEIGHTS, model / "checkpoint-5" / "model.safetensors")
    save_file(WEIGHTS, model / "model.safetensors", metadata={"lr": "1e999", "seed": "9" * 4000})
    save_file(WEIGHTS, model / "adapter_model.safetensors")
    return model


def small_cnn_zoo(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        np.save(root / name / "weights.npy", np.zeros((2, 6), np.float32))
        (root / name / "layout.csv").write_text(LAYOUT)
        (root / name / "metrics.csv.gz").write_bytes(gzip.compress(METRICS.encode()))
    return root / "a"


def loose(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    torch.save(WEIGHTS, root / "a.pt")
    return root


PLACES: list[tuple[Callable[[Path], Path], str]] = [
    *((tune, name) for name in ("params.json", "config.json", "result.json", "progress.csv", "../../config.json")),
    *((huggingface, name) for name in ("config.json", "adapter_config.json", "trainer_state.json", "README.md")),
    *((huggingface, name) for name in ("checkpoint-5/trainer_state.json", "model.safetensors.index.json")),
    *((small_cnn_zoo, name) for name in ("layout.csv", "metrics.csv.gz", "weights.npy", "x_split.csv")),
    (loose, "known.csv"),
]

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "only a byte-order mark": b"\xef\xbb\xbf",
    "object after a mark": b'\xef\xbb\xbf{"training_iteration": 1, "license": "mit"}',
    "UTF-16": '{"license": "mit"}'.encode("utf-16"),
    "Latin-1": '{"license": "é"}'.encode("latin-1"),
    "zeros": b"\0" * 1000,
    "list": b"[[], {}, 1, null]",
    "duplicate keys": b'{"license": 1, "license": {"a": 2}, "training_iteration": 1, "training_iteration": 2}',
    "deep lists": b"[" * 50_000,
    "deep objects": b'{"a":' * 980 + b"1" + b"}" * 980,
    "deep YAML": b"---\na: " + b"[" * 2000 + b"\n---\n",
    "YAML of many names": b"---\na: &a [x]\nb: &b [*a, *a]\nlicense: *b\ntags: [1, null]\n---\n| a | b |\n|-|-|\n",
    "YAML of dates": b"---\nlicense: 2024-01-01\nbase_model: [2024-01-01, 0x10]\nlanguage: no\n1: 2\n---\n",
    "YAML of odd times": b"---\nlicense: 2024-99-99 99:99:99\n---\n",
    "YAML that makes objects": b"---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "YAML key of a list": b"---\n? [a, b]\n: 1\n---\n",
    "index that leads out": b'{"weight_map": {"a": "../../x.safetensors", "b": 1, "c": null}}',
    "index of nothing": b'{"weight_map": []}',
    "open quotes": b'a,b\n"x',
    "wide table": b"step,step\n1,2\n",
    "long line": b'{"a": "' + b"x" * 300_000 + b'"}',
    "long cell": b"varname,start_idx,end_idx,shape\n" + b"x" * 300_000 + b",0,6,6\n",
    "gzip of nothing": gzip.compress(b""),
    "gzip of zeros": gzip.compress(b"\0" * 100),
    "cut gzip": gzip.compress(METRICS.encode())[:-9],
    "gzip of odd steps": gzip.compress(METRICS.replace("86,", "-86,").encode()),
    "gzip of steps that no integer holds": gzip.compress(METRICS.replace("86,", "9" * 30 + ",").encode()),
    "gzip of text among numbers": gzip.compress(METRICS.replace("0.5,1", "n/a,?").encode()),
    "gzip of dates": gzip.compress(METRICS.replace(",3\n", ",2024-01-01\n").replace(",m,", ",2024-01-01,").encode()),
    "gzip of no UTF-8": gzip.compress(METRICS.encode().replace(b",m,", b",\xff,")),
    "array of objects": b"\x93NUMPY\x01\x00\x46\x00{'descr': '|O', 'fortran_order': False, 'shape': (2, 6), }".ljust(
        80
    ),
    "array of odd shape": b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 6)}".ljust(
        80
    ),
    "array of odd names": b"\x93NUMPY\x01\x00\x46\x00{'descr': [('a', '<f4')], 'fortran_order': 0, 'shape': 3}".ljust(
        80
    ),
    "layout of odd sizes": b'varname,start_idx,end_idx,shape\na/kernel:0,0,6,"(-2, -3)"\n',
    "layout of huge numbers": b"varname,start_idx,end_idx,shape\na/bias:0,0," + b"9" * 5000 + b",6\n",
    "layout of short rows": b"varname,start_idx,end_idx,shape\na\n",
    "layout of long rows": b"varname,start_idx,end_idx,shape\na/bias:0,0,6,6,7,8\n",
    "rows": b"0\n1\n",
    "rows twice": b"1\n1\n",
    "huge rows": b"9" * 40,
    "paths": b"path,epoch,split,x\na.pt,1e300,train,1\n",
    "negative epochs": b"path,epoch\na.pt,-1\n",
    "infinite epochs": b"path,epoch\na.pt,inf\n",
    "odd splits": b"path,split\na.pt,\xff\n",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize(("make", "name"), PLACES, ids=[f"{make.__name__}-{name}" for make, name in PLACES])
def test_odd_files_beside_weights(tmp_path: Path, make: Callable[[Path], Path], name: str, content: bytes):
    (make(tmp_path / "zoo") / name).write_bytes(content)
    check(tmp_path / "zoo", tmp_path)


NUMBERS = [10**400, -(10**400), 2**63, -(2**63) - 1, 1e300, float("nan"), float("inf"), float("-inf"), -1, 0, 1, 1.0]
TEXTS = ["", "\ud800", "a\udcffb", "\0", "train", "no", "n/a", "{}", "../../x", "ü" * 3, "1", "\u2028"]
SCALARS = st.sampled_from([*NUMBERS, *TEXTS, True, False, None])
KEYS = st.sampled_from(
    [
        *(
            "training_iteration",
            "epoch",
            "train_acc",
            "test_acc",
            "val_acc",
            "license",
            "config",
            "seed",
            "a",
            "\ud800",
        ),
        *("id2label", "_name_or_path", "base_model_name_or_path", "global_step", "log_history", "step", "max_steps"),
        *("weight_map", "tags", "license_name", "base_model", "model-index", "results", "metrics", "dataset", "type"),
    ]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
JSON_PLACES = [(make, name) for make, name in PLACES if name.endswith(".json") or name == "README.md"]


@pytest.mark.parametrize(("make", "name"), JSON_PLACES, ids=[f"{make.__name__}-{name}" for make, name in JSON_PLACES])
@settings(max_examples=30, deadline=None)
@given(content=st.dictionaries(KEYS, VALUES, max_size=6) | VALUES)
def test_odd_values_in_files_beside_weights(make: Callable[[Path], Path], name: str, content: object):
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(content)
        text = f"---\n{text}\n---\n" if name == "README.md" else text
        (make(Path(folder) / "zoo") / name).write_text(text, encoding="utf-8")
        check(Path(folder) / "zoo", Path(folder))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=6), max_size=4))
def test_odd_lines_of_results(rows: list[dict[str, object]]):
    with tempfile.TemporaryDirectory() as folder:
        model = tune(Path(folder) / "zoo")
        (model / "result.json").write_text("\n".join(json.dumps({"training_iteration": 1} | row) for row in rows))
        check(Path(folder) / "zoo", Path(folder))


def check(zoo: Path, folder: Path) -> None:
    """Lists a zoo, and does what every job does with the records."""
    try:
        records = discover(zoo)
        known = zoo / "known.csv"
        records = join_properties(records, known, zoo) if known.is_file() else records
    except InputError as error:
        assert len(str(error)) < 2000
        return
    assert records
    for text in texts(records):
        text.encode("utf-8")
    write_catalog(folder / "c.parquet", records, {}, source=str(zoo))
    read = read_catalog(folder / "c.parquet")
    assert [(record.id, record.epoch, record.model) for record in read] == [
        (record.id, record.epoch, record.model) for record in records
    ]
    kept, left_out = select(records, "not missing(model) and not isnan(path)")
    assert len(kept) + len(left_out) == len(records)
    assert set(assign_splits(records, TokensConfig())) == {record.model for record in records}


def texts(records: list[Record]) -> Iterator[str]:
    for record in records:
        yield from (record.id, record.model, record.license or "", *record.parents, record.split or "")
        for values in (record.properties, record.config):
            yield from values
            yield from (value for value in values.values() if isinstance(value, str))
            assert all(value is None or type(value) in (bool, int, float, str) for value in values.values())
