import csv
import gzip
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.readers import small_cnn_zoo

VARIABLES = (
    ("sequential/conv2d/kernel:0", (3, 3, 1, 4)),
    ("sequential/conv2d/bias:0", (4,)),
    ("sequential/conv2d_1/kernel:0", (3, 3, 4, 5)),
    ("sequential/conv2d_1/bias:0", (5,)),
    ("sequential/dense/kernel:0", (5, 10)),
    ("sequential/dense/bias:0", (10,)),
)
WIDTH = sum(int(np.prod(shape)) for _, shape in VARIABLES)
STEPS = (0, 1, 86)


def write_layout(folder: Path, variables=VARIABLES) -> None:
    with (folder / "layout.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["varname", "start_idx", "end_idx", "shape"])
        start = 0
        for name, shape in variables:
            writer.writerow([name, start, start := start + int(np.prod(shape)), str(shape)])


def write_metrics(folder: Path, rows: list[dict]) -> None:
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def metrics(runs: int, dataset: str = "cifar10") -> list[dict]:
    return [
        {
            "config.activation": ("relu", "tanh")[run % 2],
            "config.dataset": dataset,
            "config.learning_rate": 0.1 / (run + 1),
            "config.dropout": "" if run == 0 else 0.5,
            "modeldir": f"/zoo/{dataset}/trial_{run}/model",
            "step": step,
            "test_accuracy": 0.001 * (10 * run + step),
            "test_loss": 2.0 - 0.01 * step,
            "train_accuracy": 0.002 * (10 * run + step),
            "train_loss": 1.9 - 0.01 * step,
        }
        for run in range(runs)
        for step in STEPS
    ]


def write_zoo(folder: Path, runs: int = 4, dtype: type = np.float32, dataset: str = "cifar10") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(0).normal(size=(runs * len(STEPS), WIDTH)).astype(dtype)
    np.save(folder / "weights.npy", weights)
    write_layout(folder)
    write_metrics(folder, metrics(runs, dataset))
    return weights


def test_one_record_a_row(tmp_path: Path):
    write_zoo(tmp_path)
    records = small_cnn_zoo.discover(tmp_path)
    ids = ["trial_0/model/0", "trial_0/model/1", "trial_0/model/86", "trial_1/model/0"]
    assert [record.id for record in records[:4]] == ids
    record = records[5]
    assert (record.model, record.epoch, record.member, record.reader) == ("trial_1/model", 86, "5", "small_cnn_zoo")
    assert record.path == str(tmp_path / "weights.npy") and record.split is None
    assert record.config == {"activation": "tanh", "dataset": "cifar10", "learning_rate": 0.05, "dropout": 0.5}
    assert records[0].config["dropout"] is None
    assert record.properties == pytest.approx(
        {"test_accuracy": 0.096, "test_loss": 1.14, "train_accuracy": 0.192, "train_loss": 1.04}
        | {"test_acc": 0.096, "train_acc": 0.192, "ggap": 0.096}
    )


def test_rows_of_one_run_share_their_config(tmp_path: Path):
    write_zoo(tmp_path)
    records = small_cnn_zoo.discover(tmp_path)
    assert records[0].config is records[1].config is records[2].config
    assert len({id(record.config) for record in records}) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_tensors_of_a_row_are_in_torch_s_names_and_axes_and_nothing_is_lost(tmp_path: Path, dtype: type):
    weights = write_zoo(tmp_path, dtype=dtype)
    record = small_cnn_zoo.discover(tmp_path)[7]
    state_dict = small_cnn_zoo.open_checkpoint(record).state_dict()
    assert {key: tuple(value.shape) for key, value in state_dict.items()} == {
        "layers.0.weight": (4, 1, 3, 3),
        "layers.0.bias": (4,),
        "layers.1.weight": (5, 4, 3, 3),
        "layers.1.bias": (5,),
        "layers.2.weight": (10, 5),
        "layers.2.bias": (10,),
    }
    assert list(state_dict) == [f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")]
    back = [
        value.numpy().transpose(2, 3, 1, 0) if value.dim() == 4 else value.numpy().T for value in state_dict.values()
    ]
    assert np.concatenate([value.reshape(-1) for value in back]).tobytes() == weights[7].tobytes()


def test_a_convolution_of_the_row_gives_what_tensorflow_s_definition_gives(tmp_path: Path):
    weights = write_zoo(tmp_path, dtype=np.float64)
    state_dict = small_cnn_zoo.open_checkpoint(small_cnn_zoo.discover(tmp_path)[2]).state_dict()
    kernel = weights[2, 40:220].reshape(3, 3, 4, 5)  # height, width, in, out
    image = np.random.default_rng(1).normal(size=(3, 3, 4))
    expected = np.einsum("hwi,hwio->o", image, kernel)
    found = torch.nn.functional.conv2d(torch.from_numpy(image.transpose(2, 0, 1))[None], state_dict["layers.1.weight"])
    np.testing.assert_allclose(found.numpy().reshape(-1), expected, rtol=1e-12)


def test_the_rows_become_tokens(tmp_path: Path):
    write_zoo(tmp_path)
    checkpoint = small_cnn_zoo.open_checkpoint(small_cnn_zoo.discover(tmp_path)[0])
    table = build_layer_table(checkpoint.meta)
    assert [layer.key for layer in table.layers] == [f"layers.{i}.weight" for i in range(3)]
    assert table.parameters == WIDTH


def test_only_the_row_is_read(tmp_path: Path):
    """A file whose other rows do not exist on the disk (a hole of 40 GB) is opened all the same."""
    write_zoo(tmp_path)
    rows = 10**10 // WIDTH
    header = np.lib.format.open_memmap(tmp_path / "weights.npy", "w+", np.float32, (rows, WIDTH))
    header[11] = np.arange(WIDTH)
    del header
    record = small_cnn_zoo.Record("a/0", "a", 0, str(tmp_path / "weights.npy"), reader=small_cnn_zoo.NAME, member="11")
    state_dict = small_cnn_zoo.open_checkpoint(record).state_dict()
    assert state_dict["layers.2.bias"].tolist() == list(range(WIDTH - 10, WIDTH))


def test_bias_listed_before_kernel(tmp_path: Path):
    write_zoo(tmp_path)
    write_layout(tmp_path, [VARIABLES[i] for i in (1, 0, 3, 2, 5, 4)])
    state_dict = small_cnn_zoo.open_checkpoint(small_cnn_zoo.discover(tmp_path)[0]).state_dict()
    assert list(state_dict) == [f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")]


def test_the_four_data_sets_under_one_root(tmp_path: Path):
    for name in ("mnist", "cifar10"):
        write_zoo(tmp_path / name, runs=2, dataset=name)
    records = small_cnn_zoo.discover(tmp_path)
    assert [record.model for record in records[::3]] == [
        f"{name}/trial_{run}/model" for name in ("cifar10", "mnist") for run in range(2)
    ]
    assert len({record.id for record in records}) == 12


def test_without_modeldir_a_run_ends_where_the_step_falls_back(tmp_path: Path):
    write_zoo(tmp_path)
    rows = [{key: value for key, value in row.items() if key != "modeldir"} for row in metrics(4)]
    write_metrics(tmp_path, rows)
    assert [record.model for record in small_cnn_zoo.discover(tmp_path)][2:7] == ["run_000000"] + 3 * ["run_000001"] + [
        "run_000002"
    ]


@pytest.mark.parametrize("place", ["cifar10/cifar10_split.csv", "cifar10/nfn_split.csv", "cifar10_split.csv"])
def test_the_published_benchmark_split(tmp_path: Path, place: str):
    runs = 41
    write_zoo(tmp_path / "cifar10", runs=runs)
    order = np.random.default_rng(3).permutation(runs * len(STEPS))
    (tmp_path / place).write_text("".join(f"{row}\n" for row in order))
    (tmp_path / "mnist_split.csv").write_text("of another data set")
    splits = {int(record.member): record.split for record in small_cnn_zoo.discover(tmp_path)}

    final = [row for row in order if STEPS[row % 3] == 86]  # the published protocol, step by step
    trainval = list(range(len(final) // 2))
    random.Random(0).shuffle(trainval)
    assert {row for row, split in splits.items() if split == "test"} == set(final[20:])
    assert {row for row, split in splits.items() if split == "train"} == {final[place] for place in trainval[:16]}
    assert {row for row, split in splits.items() if split == "val"} == {final[place] for place in trainval[16:]}
    assert all(split is None for row, split in splits.items() if STEPS[row % 3] != 86)


def test_svhn_cropped_takes_the_split_file_of_svhn(tmp_path: Path):
    write_zoo(tmp_path / "svhn_cropped", dataset="svhn_cropped")
    (tmp_path / "svhn_split.csv").write_text("\n".join(map(str, range(12))))
    assert sum(record.split == "test" for record in small_cnn_zoo.discover(tmp_path)) == 2


def test_a_split_of_another_data_set_is_refused(tmp_path: Path):
    write_zoo(tmp_path)
    (tmp_path / "cifar10_split.csv").write_text("\n".join(map(str, range(13))))
    with pytest.raises(InputError, match=r"cifar10_split\.csv: does not name each of the 12 rows .*once"):
        small_cnn_zoo.discover(tmp_path)
    (tmp_path / "cifar10_split.csv").write_text("index\n0\n")
    with pytest.raises(InputError, match="not one row number a line"):
        small_cnn_zoo.discover(tmp_path)
    (tmp_path / "mnist_split.csv").write_text("0\n")
    with pytest.raises(InputError, match=r"holds 2 split files \(cifar10_split\.csv, mnist_split\.csv\)"):
        small_cnn_zoo.discover(tmp_path)


def test_nothing_of_this_format(tmp_path: Path):
    np.save(tmp_path / "weights.npy", np.zeros((2, 3)))
    assert small_cnn_zoo.discover(tmp_path) == []
    assert small_cnn_zoo.discover(tmp_path / "weights.npy") == []
    assert small_cnn_zoo.discover(tmp_path / "missing") == []


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickled_array_is_refused_and_not_run(tmp_path: Path):
    write_zoo(tmp_path)
    np.save(tmp_path / "weights.npy", np.array([[Malicious(tmp_path / "ran")]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"weights\.npy: .*without running code"):
        small_cnn_zoo.discover(tmp_path)
    (tmp_path / "weights.npy").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"weights\.npy: .*without running code"):
        small_cnn_zoo.discover(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_shape_is_read_and_never_evaluated(tmp_path: Path):
    write_zoo(tmp_path)
    text = (tmp_path / "layout.csv").read_text()
    call = f"\"__import__('pathlib').Path('{tmp_path / 'ran'}').touch()\""
    (tmp_path / "layout.csv").write_text(text.replace('"(4,)"', call))
    with pytest.raises(InputError, match=r"layout\.csv: not a table of varname"):
        small_cnn_zoo.discover(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", [np.zeros((12, WIDTH), np.int64), np.zeros(12 * WIDTH, np.float32)])
def test_arrays_of_another_kind_are_refused(tmp_path: Path, values: np.ndarray):
    write_zoo(tmp_path)
    np.save(tmp_path / "weights.npy", values)
    with pytest.raises(InputError, match=r"weights\.npy: holds .* not float32 or float64"):
        small_cnn_zoo.discover(tmp_path)


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_a_layout_of_another_width_is_refused(tmp_path: Path, width: int):
    write_zoo(tmp_path)
    np.save(tmp_path / "weights.npy", np.zeros((12, width), np.float32))
    with pytest.raises(InputError, match=rf"weights\.npy: has {width} values a row, but layout\.csv describes {WIDTH}"):
        small_cnn_zoo.discover(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("36,40", "35,39", r"overlap at column 35"),
        ("36,40", "37,41", r"leave a gap at column 36"),
        ('"(4,)"', '"(5,)"', r"conv2d/bias:0 has 4 columns but shape \(5,\)"),
        ("conv2d/bias:0", "conv2d/gamma:0", r"conv2d/gamma:0 of shape \(4,\) is neither"),
        ("start_idx", "begin", r"not a table of varname, start_idx"),
        ('"(4,)"', '"(-2, -2)"', r"not a table of varname.*shape \(-2, -2\)"),
        ('"(4,)"', "-" * 20_000 + "1", r"not a table of varname.*a shape of 20001 characters"),
        ('"(4,)"', "(" * 90, r"not a table of varname"),
        ('"(4,)"', "-" * 90 + "4", r"has 4 columns but shape|not a table of varname|overlap|gap"),
        ('"(4,)"', '"(1e999,)"', r"not a table of varname"),
        ('"(4,)"', "9" * 99, r"has 4 columns but shape"),
        ('"(4,)"', "", r"not a table of varname"),
        ("36,40", "x,40", r"not a table of varname"),
        ("36,40", "\0,40", r"not a table of varname"),
        ("sequential/conv2d/bias:0", "x" * 200_000, r"not a table of varname"),
    ],
)
def test_damaged_layouts_are_refused(tmp_path: Path, old: str, new: str, message: str):
    write_zoo(tmp_path)
    text = (tmp_path / "layout.csv").read_text()
    (tmp_path / "layout.csv").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message) as error:
        small_cnn_zoo.discover(tmp_path)
    assert "layout.csv" in str(error.value)


def test_metrics_that_do_not_fit_are_refused(tmp_path: Path):
    write_zoo(tmp_path)
    write_metrics(tmp_path, metrics(3))
    with pytest.raises(InputError, match=r"metrics\.csv\.gz: has 9 lines, but weights\.npy beside it has 12 rows"):
        small_cnn_zoo.discover(tmp_path)
    write_metrics(tmp_path, [{key: value for key, value in row.items() if key != "step"} for row in metrics(4)])
    with pytest.raises(InputError, match=r"metrics\.csv\.gz: has no column step"):
        small_cnn_zoo.discover(tmp_path)
    content = (tmp_path / "metrics.csv.gz").read_bytes()
    (tmp_path / "metrics.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"metrics\.csv\.gz: truncated"):
        small_cnn_zoo.discover(tmp_path)
    (tmp_path / "metrics.csv.gz").unlink()
    with pytest.raises(InputError, match=r"metrics\.csv\.gz: truncated, missing"):
        small_cnn_zoo.discover(tmp_path)


def test_a_file_written_anew_is_read_anew(tmp_path: Path):
    write_zoo(tmp_path)
    record = small_cnn_zoo.discover(tmp_path)[11]
    small_cnn_zoo.open_checkpoint(record)
    np.save(tmp_path / "weights.npy", np.zeros((5, WIDTH), np.float32))
    with pytest.raises(InputError, match="has no row 11, only 5"):
        small_cnn_zoo.open_checkpoint(record)
    (tmp_path / "weights.npy").unlink()
    with pytest.raises(InputError, match="missing"):
        small_cnn_zoo.open_checkpoint(record)


HEADERS = ["{'descr':" + "[" * 5000 + "}", "(" * 5000, "{'descr': ", "\0", "{" * 5000, "-" * 60_000 + "1", "'" * 3]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_damaged_headers_of_arrays_are_refused(tmp_path: Path, header: str):
    write_zoo(tmp_path)
    text = header.encode()
    (tmp_path / "weights.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(InputError, match=r"weights\.npy: truncated, missing, or no array") as error:
        small_cnn_zoo.discover(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_damaged_data_set_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("cifar10", "mnist", "svhn"):
        write_zoo(tmp_path / name, runs=2, dataset=name)
    (tmp_path / "cifar10" / "weights.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "svhn" / "metrics.csv.gz").unlink()
    assert {record.model.split("/")[0] for record in small_cnn_zoo.discover(tmp_path)} == {"mnist"}
    assert "cifar10/weights.npy: truncated" in caplog.text and "svhn/metrics.csv.gz: truncated" in caplog.text
    (tmp_path / "mnist" / "layout.csv").write_text("")
    with pytest.raises(InputError, match=r"cifar10/weights\.npy: truncated"):
        small_cnn_zoo.discover(tmp_path)


def test_a_record_names_the_layout_that_decides_its_weights(tmp_path: Path):
    write_zoo(tmp_path)
    assert {record.beside for record in small_cnn_zoo.discover(tmp_path)} == {(str(tmp_path / "layout.csv"),)}


@pytest.mark.parametrize(
    "change",
    [
        {"train_accuracy": "n/a"},
        {"train_accuracy": True},
        {"train_accuracy": "2024-01-01"},
        {"test_accuracy": 10**30},
        {"test_loss": "nan", "test_accuracy": "inf"},
        {"config.seed": "", "config.activation": ""},
        {"config.seed": "2024-01-01 10:00:00"},
        {"modeldir": ""},
        {"modeldir": "2024-01-01"},
        {"": 3},
    ],
)
def test_odd_values_of_the_metrics(tmp_path: Path, change: dict):
    write_zoo(tmp_path, runs=2)
    rows = [row | change for row in metrics(2)]
    for number, row in enumerate(rows):
        row["step"] = number
    write_metrics(tmp_path, rows)
    assert len(discover(tmp_path)) == 6


def test_a_column_twice_is_refused(tmp_path: Path):
    write_zoo(tmp_path, runs=1)
    with gzip.open(tmp_path / "metrics.csv.gz", "wt") as file:
        file.write("step,step\n0,0\n1,1\n2,2\n")
    with pytest.raises(InputError, match=r"metrics\.csv\.gz: has a column twice"):
        small_cnn_zoo.discover(tmp_path)
