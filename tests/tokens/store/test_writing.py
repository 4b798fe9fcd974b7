"""Writing a token store, end to end on Ray."""

import dataclasses
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store import SPLITS, Architecture, RowGroup, Segment, TokenStore, inspection, writing
from sane_ray.tokens.store.inputs import Inputs, look
from sane_ray.tokens.store.token_files import FileJob, Job, Settings, write_part
from sane_ray.tokens.store.writing import matching_store, preview, write_store
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.checkpoint import load_state_dict
from sane_ray.zoo.readers import Record


def assert_round_trip(store: TokenStore, zoo: Path, relative: float) -> None:
    """Every checkpoint comes back, each layer to a tolerance relative to its normalisation."""
    for row in store.models.select(["checkpoint", "source"]).to_pylist():
        original, restored = load_state_dict(zoo / row["source"]), store.state_dict(row["checkpoint"])
        architecture = store.architecture_of(row["checkpoint"])
        assert set(original) - set(restored) == {entry.key for entry in architecture.table.untokenized}
        scales = dict(
            zip((layer.key for layer in architecture.table.layers), architecture.normalization.scale, strict=True)
        )
        for key, value in restored.items():
            scale = scales.get(key, scales.get(key.replace("bias", "weight")))
            assert torch.allclose(value, original[key], rtol=0, atol=relative * scale), key


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def checkpoints_of(group: RowGroup) -> list[int]:
    return [segment.checkpoint for segment in group.segments]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "zoo")


# ------------------------------------------------------------------------------------------------------- what is stored


def test_every_checkpoint_comes_back(shared_store: TokenStore, shared_zoo):
    assert shared_store.dtype == "float16" and len(shared_store.models) == 20
    assert_round_trip(shared_store, shared_zoo.path, 0.004)  # values up to 8 scales, half of 2^-10 of them


def test_float32_without_normalisation_is_bit_equal(shared_zoo, tmp_path: Path):
    store = shared_zoo.prepare(tmp_path / "store", dtype="float32", normalization="none")
    assert_round_trip(store, shared_zoo.path, 0.0)


def test_bfloat16(shared_zoo, tmp_path: Path):
    store = shared_zoo.prepare(tmp_path / "store", dtype="bfloat16")
    assert store.read_row_group(store.row_groups("val")[0])[0][1].dtype == np.uint16
    assert_round_trip(store, shared_zoo.path, 0.03)


def test_l2_keeps_the_norms_of_each_model(shared_zoo, tmp_path: Path):
    store = shared_zoo.prepare(tmp_path / "store", dtype="float32", normalization="l2")
    assert_round_trip(store, shared_zoo.path, 1e-6)
    weights = load_state_dict(shared_zoo.path / store.models["source"][3].as_py())
    norm = torch.cat([weights["conv.weight"].reshape(-1), weights["conv.bias"]]).norm()
    assert store.model_scale(3)[0] == pytest.approx(norm.item())


def test_token_size_below_the_widest_channel_and_batch_norm_ignored(shared_zoo, tmp_path: Path):
    store = shared_zoo.prepare(tmp_path / "store", token_size=5, batch_norm="ignore", dtype="float32")
    (architecture,) = store.architectures.values()
    assert [layer.key for layer in architecture.table.layers] == ["conv.weight", "head.weight"]
    assert [layer.tokens_per_channel for layer in architecture.table.layers] == [2, 4] and store.token_size == 5
    assert_round_trip(store, shared_zoo.path, 1e-6)


def test_token_files_are_plain_parquet(shared_store: TokenStore):
    (architecture,) = shared_store.architectures.values()
    table, seen = architecture.table, []
    for file in sorted(shared_store.path.glob("tokens/split=*/part-*.parquet")):
        rows = pq.read_table(file, partitioning=None)
        integers = {name: pa.int32() for name in ("checkpoint", "index", "layer", "channel", "signal")}
        assert {field.name: field.type for field in rows.schema} == integers | {"values": pa.binary(17 * 2)}
        frame = rows.to_pandas()
        for ordinal, tokens in frame.groupby("checkpoint", sort=False):
            assert np.array_equal(tokens[["index", "layer", "channel"]].to_numpy(), table.positions)
            assert np.array_equal(tokens["signal"].to_numpy(), table.signal_counts)
            values = np.frombuffer(b"".join(tokens["values"]), "<f2").reshape(-1, 17)
            assert np.array_equal(values, shared_store.tokens(ordinal).numpy())
            assert not values[np.arange(17) >= table.signal_counts[:, None]].any()  # padding
            seen.append(ordinal)
    assert sorted(seen) == list(range(20))


def test_models_table_reads_with_pandas(shared_store: TokenStore):
    import pandas

    frame = pandas.read_parquet(shared_store.path / "models.parquet")
    assert frame["checkpoint"].tolist() == list(range(20)) and frame["id"].is_unique
    assert frame["id"].tolist() == [
        f"{model}/{epoch}" for model, epoch in zip(frame["model"], frame["epoch"], strict=True)
    ]
    assert frame["property.ggap"].tolist() == pytest.approx([0.25, 0.24] * 10)
    assert frame["config.model::type"].unique().tolist() == ["CNN"] and frame["config.seed"].dtype == np.int64
    assert set(frame["tokens"]) == {19} and set(frame["parameters"]) == {4 * 10 + 4 * 2 + 4 + 4 + 3 * 17}
    assert frame["license"].isna().all() and frame["sha256"].is_unique


def test_row_groups_are_small_mixed_and_complete(shared_store: TokenStore):
    models = shared_store.models["model"].to_pylist()
    seen: list[int] = []
    for split in SPLITS:
        for group in shared_store.row_groups(split):
            assert {shared_store.models["split"][ordinal].as_py() for ordinal in checkpoints_of(group)} == {split}
            seen += checkpoints_of(group)
    assert sorted(seen) == list(range(20))
    train = shared_store.row_groups("train")
    assert len(train) > 3 and len({group.file for group in train}) > 1
    assert any(len({models[c] for c in checkpoints_of(g)}) == len(g.segments) > 1 for g in train)


def test_splits_are_by_model_from_the_seed(shared_store: TokenStore, shared_zoo, tmp_path: Path):
    def splits(store: TokenStore) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in store.models.select(["model", "split"]).to_pylist():
            found.setdefault(row["model"], set()).add(row["split"])
        return found

    first = splits(shared_store)
    assert all(len(names) == 1 for names in first.values())
    counts = [shared_store.counts(split).models for split in SPLITS]
    assert sum(counts) == 10 and min(counts) > 0 and counts[0] == max(counts)
    assert splits(shared_zoo.prepare(tmp_path / "store", seed=1)) != first


def test_statistics_come_from_the_train_split_alone(shared_store: TokenStore, shared_zoo, tmp_path: Path):
    def with_other_weights(split: str) -> TokenStore:
        zoo = tmp_path / split / "zoo"
        shutil.copytree(shared_zoo.path, zoo)
        ordinal = checkpoints_of(shared_store.row_groups(split)[0])[0]
        path = zoo / shared_store.models["source"][ordinal].as_py()
        torch.save({key: value * 3 for key, value in load_state_dict(path).items()}, path)
        return type(shared_zoo)(zoo).prepare("store", row_group_mb=0.003, file_mb=0.006)

    normalization = next(iter(shared_store.architectures.values())).normalization
    assert next(iter(with_other_weights("val").architectures.values())).normalization == normalization
    assert next(iter(with_other_weights("train").architectures.values())).normalization != normalization


def test_the_same_bytes_when_written_twice_here_and_on_ray(shared_store: TokenStore, shared_zoo, tmp_path: Path):
    again = shared_zoo.prepare(tmp_path / "again", row_group_mb=0.003, file_mb=0.006)
    files = files_of(shared_store.path)
    assert files == files_of(again.path) and len(files) > 4
    assert filecmp.cmpfiles(shared_store.path, again.path, files, shallow=False)[0] == files
    assert again.fingerprint == shared_store.fingerprint


def test_a_large_model_in_slices_and_segments_is_the_same(
    anywhere, shared_zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = shared_zoo.prepare(tmp_path / "whole", dtype="float32", normalization="l2")
    monkeypatch.setattr(inspection, "BATCH_BYTES", 500)
    monkeypatch.setattr(writing, "BATCH_BYTES", 500)
    cut = shared_zoo.prepare(
        tmp_path / "cut", dtype="float32", normalization="l2", segment_mb=0.0005, row_group_mb=0.0007
    )
    assert len(whole.segments) == 20 and len(cut.segments) == 60
    assert cut.models["sha256"].equals(whole.models["sha256"]) and cut.architectures == whole.architectures
    for checkpoint in range(20):
        assert torch.equal(cut.tokens(checkpoint), whole.tokens(checkpoint))
        restored, expected = cut.state_dict(checkpoint), whole.state_dict(checkpoint)
        assert all(torch.equal(restored[key], expected[key]) for key in expected)
    assert cut.counts() == dataclasses.replace(whole.counts(), row_groups=60)


@pytest.mark.parametrize("layout", ["dense", "mixed"])
@pytest.mark.parametrize("normalization", ["standardize", "minmax", "l2", "none"])
def test_every_layout_and_normalisation_comes_back(shared_zoo, tmp_path: Path, layout: str, normalization: str):
    store = shared_zoo.prepare(
        tmp_path / "store", dtype="float32", layout=layout, normalization=normalization, token_size=8
    )
    assert_round_trip(store, shared_zoo.path, 0 if normalization == "none" else 1e-6)


def test_copies_are_left_out_and_kept_on_demand(new_zoo: Callable):
    zoo = new_zoo(models=4, epochs=1)
    zoo.add("model_03", 7, zoo.weights(0))  # as model_00 at epoch 0
    store = zoo.prepare("store")
    assert [(row["id"], row["reason"]) for row in store.skipped] == [
        ("model_03/7", "has the same weights as model_00/0")
    ]
    assert store.index["left_out"] == {"unusable": 0, "not wanted": 1, "not read": 0}
    assert len(zoo.prepare("all", duplicates="keep").models) == 5


def test_a_threshold_is_on_weights_alone(new_zoo: Callable):
    zoo = new_zoo(models=4, epochs=1)
    zoo.add("large", 0, zoo.weights(5) | {"head.bias": torch.tensor([0.0, -50.0, 0.0])})
    zoo.add("statistics", 0, zoo.weights(6) | {"norm.running_var": torch.full((4,), 9e4)})
    store = zoo.prepare("store", weight_threshold=20.0, dtype="float32")
    assert [row["id"] for row in store.skipped] == ["large/0"]
    assert "weight of size 50, above tokens.weight_threshold" in store.skipped[0]["reason"]
    with pytest.raises(InputError, match="none of 6 usable checkpoints is wanted"):
        zoo.prepare("none", weight_threshold=1e-6)


def test_splits_stay_put_when_models_are_added(new_zoo: Callable):
    zoo = new_zoo(models=60, epochs=1)
    before = zoo.prepare("before")
    for model in range(60, 90):
        zoo.add(f"model_{model:02d}", 0, zoo.weights(100 * model))
    after = zoo.prepare("after")
    splits = dict(zip(after.models["model"].to_pylist(), after.models["split"].to_pylist(), strict=True))
    assert all(splits[row["model"]] == row["split"] for row in before.models.to_pylist())
    same = zoo.prepare("same", split_file=str(before.path / "models.parquet"))
    assert len(same.models) == 60 and same.models["split"].equals(before.models["split"])


def test_a_symmetry_file_is_used_where_it_fits_and_refused_where_none_does(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=4, epochs=1)
    symmetry = Symmetry({"conv.weight": ("hidden", None, None, None), "conv.bias": ("hidden",)}, {"hidden": 4})
    symmetry.save(tmp_path / "symmetry.json")
    store = zoo.prepare("store", symmetry=[str(tmp_path / "symmetry.json")])
    assert next(iter(store.architectures.values())).symmetry == symmetry
    Symmetry({"other.weight": ("hidden", None)}, {"hidden": 4}).save(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"other\.json fits no architecture of the zoo .*other\.weight"):
        zoo.prepare("none", symmetry=[str(tmp_path / "other.json")])


def test_epochs_can_be_chosen(shared_zoo, tmp_path: Path):
    store = shared_zoo.prepare(tmp_path / "store", epochs=[1, 7])
    assert set(store.models["epoch"].to_pylist()) == {1} and len(store.models) == 10
    with pytest.raises(InputError, match=r"tokens\.epochs is \[7\]: the zoo .* only epochs \[0, 1\]"):
        shared_zoo.prepare(tmp_path / "none", epochs=[7])


# ------------------------------------------------------------------------------------------------------- a second run


def test_a_second_run_with_the_same_inputs_does_nothing(shared_store: TokenStore, shared_zoo):
    before = {file: (shared_store.path / file).stat().st_mtime_ns for file in files_of(shared_store.path)}
    again = shared_zoo.prepare("store", row_group_mb=0.003, file_mb=0.006, max_skipped=0.5, max_architectures=3)
    assert again.fingerprint == shared_store.fingerprint
    assert before == {file: (shared_store.path / file).stat().st_mtime_ns for file in files_of(shared_store.path)}


def test_another_config_is_refused_with_what_differs(shared_store: TokenStore, shared_zoo):
    with pytest.raises(InputError) as error:
        shared_zoo.prepare("store", row_group_mb=0.003, file_mb=0.006, dtype="float32", token_size=8)
    assert "tokens.dtype was 'float16' and is now 'float32'; tokens.token_size was 0 and is now 8" in str(error.value)
    assert "Name another --store, or delete this one" in str(error.value)


def test_other_checkpoints_are_refused_with_what_differs(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=4, epochs=1)
    zoo.add("broken", 0, {"weight": torch.tensor([torch.nan])})
    zoo.prepare("store", max_skipped=0.5)

    def refused() -> str:
        with pytest.raises(InputError) as error:
            zoo.prepare("store", max_skipped=0.5)
        return str(error.value)

    copy = tmp_path / "copy"
    shutil.copytree(zoo.path, copy, copy_function=shutil.copyfile)
    assert type(zoo)(copy).prepare("store", max_skipped=0.5).path == tmp_path / "store"  # other times, same weights

    path = zoo.path / "model_00" / "checkpoint_000000" / "checkpoints"
    original, times = path.read_bytes(), path.stat()
    torch.save(zoo.weights(77), path)
    assert path.stat().st_size == len(original)
    assert "1 checkpoints are changed (for example model_00/0)" in refused()
    path.write_bytes(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    added = zoo.add("model_09", 0, zoo.weights(5))
    assert "1 checkpoints are new (for example model_09/0)" in refused()
    shutil.rmtree(added.parent.parent)

    results = zoo.path / "model_01" / "result.json"
    line = results.read_text()
    results.write_text(line.replace("0.25", "0.35"))
    assert "1 checkpoints are changed (for example model_01/0)" in refused()
    results.write_text(line)

    shutil.rmtree(zoo.path / "model_03")
    assert "1 checkpoints are gone (for example model_03/0)" in refused()


def test_all_that_decides_the_weights_decides_the_identity(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=4, epochs=1)
    layout = tmp_path / "layout.csv"
    layout.write_text("a,b")
    records = [dataclasses.replace(record, beside=(str(layout),)) for record in discover(zoo.path)]

    def digest(records: list[Record], **config: object) -> str:
        return Inputs.of(records, TokensConfig(**config), zoo.path).digest

    original = digest(records)
    layout.write_text("b,a")
    assert digest(records) != original
    layout.write_text("a,b")
    os.utime(layout, ns=(1, 1))
    assert digest(records) == original
    assert digest([dataclasses.replace(record, member="7") for record in records]) != original
    assert digest([dataclasses.replace(record, reader="files") for record in records]) != original
    assert digest(records, where="  ", align_to="model_00", max_skipped=0.5) == original
    assert digest(records, align="weights") != digest(records, align="weights", align_to="model_00") != original


def test_a_split_or_a_choice_of_readers_is_said_as_the_cause(new_zoo: Callable):
    zoo = new_zoo(models=5)
    zoo.prepare("store")
    with pytest.raises(InputError) as error:
        zoo.prepare("store", where="epoch == 1")
    assert "tokens.where was '' and is now 'epoch == 1'" in str(error.value) and "gone" not in str(error.value)
    with pytest.raises(InputError, match=r"split_by is 'config\.sed'"):
        zoo.prepare("store", split_by="config.sed")  # the mistake, not that the store is another


def test_an_architecture_without_training_models_is_normalised_by_the_kinds_of_its_layers(new_zoo: Callable):
    zoo = new_zoo(models=6, epochs=1)
    shapes = {"conv.weight": (6, 1, 5, 5), "conv.bias": (6,), "head.weight": (3, 24), "head.bias": (3,)}
    zoo.add("other", 0, zoo.weights(1000, shapes))
    splits = {f"model_{model:02d}": "train" if model < 4 else "val" for model in range(6)} | {"other": "test"}
    (zoo.path.parent / "splits.json").write_text(json.dumps(splits))
    store = zoo.prepare(
        "store", split_file=str(zoo.path.parent / "splits.json"), max_architectures=2, dtype="float32", token_size=26
    )
    known, other = store.architectures.values()
    kinds = {layer.kind: number for number, layer in enumerate(known.table.layers)}
    for number, layer in enumerate(other.table.layers):
        assert other.normalization.shift[number] == known.normalization.shift[kinds[layer.kind]]
        assert other.normalization.scale[number] == known.normalization.scale[kinds[layer.kind]]
    assert_round_trip(store, zoo.path, 1e-6)


@pytest.mark.parametrize("normalization", ["standardize", "minmax", "l2", "none"])
def test_values_beyond_float32_are_left_out(new_zoo: Callable, normalization: str):
    zoo = new_zoo(models=5, epochs=1)
    zoo.add("huge", 0, {key: value.double() * 1e39 for key, value in zoo.weights(7).items()})
    store = zoo.prepare("store", normalization=normalization, max_skipped=0.2)
    ((name, reason),) = [(row["id"], row["reason"]) for row in store.skipped]
    assert name == "huge/0" and reason == "conv.weight holds values that float32 does not"


def test_files_that_were_not_read_are_in_the_catalog(new_zoo: Callable):
    zoo = new_zoo(models=5, epochs=1)
    store = write_store(
        discover(zoo.path), zoo.path.parent / "store", TokensConfig(), source=zoo.path, unread=["notes/loose.pt"]
    )
    ((name, reason),) = [(row["id"], row["reason"]) for row in store.skipped]
    assert (name, reason) == ("notes/loose.pt", "not read: the source was read as tune")
    assert store.index["left_out"]["not read"] == 1 and len(store.considered) == 5


def test_the_look_for_a_complete_store_writes_nothing(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=3)
    assert matching_store(discover(zoo.path), tmp_path / "store", TokensConfig(), source=zoo.path) is None
    assert leftovers(tmp_path) == []


def test_a_store_without_its_index_is_refused(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=3, epochs=1)
    store = zoo.prepare("store")
    (store.path / "store.json").unlink()
    with pytest.raises(InputError, match=r"store is not a complete token store \(it has no store\.json\).*delete it"):
        zoo.prepare("store")


def test_a_folder_of_something_else_is_not_overwritten(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=3, epochs=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis is not a complete token store") as refused:
        zoo.prepare("thesis")
    assert "delete" not in str(refused.value)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_files_are_left_out_counted_and_listed(anywhere, new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=12, epochs=1)
    paths = [zoo.path / f"model_{model:02d}" / "checkpoint_000000" / "checkpoints" for model in range(12)]
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    paths[1].write_bytes(b"")
    paths[2].unlink()
    torch.save(zoo.weights(3) | {"head.bias": torch.tensor([0.0, torch.nan, 0.0])}, paths[3])
    torch.save(zoo.weights(4) | {"norm.running_var": torch.tensor([1.0, 1.0, torch.inf, 1.0])}, paths[4])
    torch.save({"linear": torch.nn.Linear(2, 2)}, paths[5])
    torch.save({"epoch_counts": torch.arange(3)}, paths[6])
    reasons = [
        "truncated",
        "the checkpoint file is empty",
        "no such checkpoint file",
        "head.bias holds NaN or infinite values",
        "norm.running_var holds NaN or infinite values",
        "needs Python code",
        "can become tokens",
    ]
    store = zoo.prepare("store", max_skipped=0.6)
    assert len(store.models) == 5 and store.counts().models == 5
    assert [row["source"] for row in store.skipped] == [str(path.relative_to(zoo.path)) for path in paths[:7]]
    for row, reason in zip(store.skipped, reasons, strict=True):
        assert reason in row["reason"]

    with pytest.raises(InputError) as error:
        zoo.prepare("strict", max_skipped=0.5)
    assert "7 of 12 checkpoints cannot be used, and config field tokens.max_skipped is 0.5" in str(error.value)
    assert all(f"{path}: " in str(error.value) for path in paths[:7])
    assert leftovers(tmp_path) == ["store"]


def test_a_zoo_without_one_usable_checkpoint(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo()
    zoo.add("model", 0, {"weight": torch.full((2, 2), torch.nan)})
    with pytest.raises(InputError, match="1 of 1 checkpoints cannot be used"):
        zoo.prepare("store", max_skipped=1.0)
    assert leftovers(tmp_path) == []


def test_values_too_large_for_the_number_format(new_zoo: Callable):
    zoo = new_zoo(models=5, epochs=1)
    weights = zoo.weights(99)
    weights["head.weight"][0, 0] = 1e5
    zoo.add("model_99", 0, weights)
    store = zoo.prepare("store", normalization="none", max_skipped=0.2)
    (skipped,) = store.skipped
    assert skipped["id"] == "model_99/0"
    assert skipped["reason"] == "head.weight reaches 1e+05 after normalisation, too large for float16"
    assert zoo.prepare("wide", normalization="none", dtype="bfloat16").skipped == []


def test_two_architectures_are_refused_with_what_differs(new_zoo: Callable, tmp_path: Path):
    zoo = two_architectures(new_zoo)
    with pytest.raises(InputError) as error:
        zoo.prepare("store")
    message = str(error.value)
    assert "holds 2 architectures, and config field tokens.max_architectures is 1: set it to 2" in message
    assert ": 8 checkpoints, for example" in message and ": 3 checkpoints, for example" in message
    assert "conv.weight has shape (6, 1, 5, 5) where the first has (4, 1, 3, 3)" in message
    assert leftovers(tmp_path) == []


def test_two_architectures_in_one_store(new_zoo: Callable):
    zoo = two_architectures(new_zoo)
    store = zoo.prepare("store", max_architectures=2, dtype="float32")
    assert store.token_size == 26 and len(store.architectures) == 2
    assert {architecture.table.token_size for architecture in store.architectures.values()} == {26}
    small, large = store.architectures.values()
    assert small.normalization != large.normalization and small.table.num_tokens == 19
    assert_round_trip(store, zoo.path, 1e-6)
    frame = store.models.to_pandas()
    assert frame[frame["split"] == "train"]["architecture"].nunique() == 2


def two_architectures(new_zoo: Callable) -> object:
    zoo = new_zoo(models=4)
    shapes = {"conv.weight": (6, 1, 5, 5), "conv.bias": (6,), "head.weight": (3, 24), "head.bias": (3,)}
    for model in range(3):
        zoo.add(f"wide_{model}", 0, zoo.weights(1000 + model, shapes))
    return zoo


def test_fewer_models_than_splits(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=2)
    with pytest.raises(
        InputError, match=r"tokens\.split is .* but 2 usable models leave none for (val|test): set that fraction"
    ):
        zoo.prepare("store")
    assert leftovers(tmp_path) == []
    store = zoo.prepare("store", split=[0.5, 0.5, 0.0])
    assert [store.counts(split).models for split in SPLITS] == [1, 1, 0] and store.row_groups("test") == []


def test_a_destination_that_cannot_be_written(new_zoo: Callable, tmp_path: Path):
    zoo = new_zoo(models=3, epochs=1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--store .*file/store cannot be written .*name another --store"):
        zoo.prepare("file/store")


def a_job(path: Path, folder: Path) -> tuple[FileJob, Settings]:
    """What one task of the second pass gets, for a file that holds ones."""
    weights = {"weight": torch.ones(2, 2)}
    torch.save(weights, path)
    normalization = Normalization("none", np.zeros(1), np.ones(1))
    architecture = Architecture("a", build_layer_table(weights), Symmetry({}, {}), normalization)
    job = Job(Segment(0, 0, 2), Record("a/0", "a", 0, str(path)), *look(str(path)), "a", None, False)
    return FileJob("part.parquet", [[job]]), Settings(str(folder), "float16", [architecture.to_dict()])


def test_a_checkpoint_that_changes_between_the_passes(tmp_path: Path):
    job, settings = a_job(tmp_path / "checkpoints", tmp_path)
    assert write_part(job, settings)["rows"] == 2
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "checkpoints")
    assert "checkpoints: changed while the store was being written" in write_part(job, settings)["error"]


def test_a_file_that_cannot_be_written(tmp_path: Path):
    job, settings = a_job(tmp_path / "checkpoints", tmp_path / "gone")
    assert "part.parquet: cannot be written" in write_part(job, settings)["error"]


# ---------------------------------------------------------------------------------------------------------- preview


def test_preview_says_what_would_be_read_and_written(shared_zoo):
    text = preview(Inputs.of(discover(shared_zoo.path), TokensConfig(), shared_zoo.path))
    assert (
        "20 checkpoints of 10 models (" in text and " train, " in text and "19 a checkpoint, of 17 values each" in text
    )


def test_preview_refuses_a_zoo_too_small_to_split(new_zoo: Callable):
    zoo = new_zoo(models=1)
    with pytest.raises(InputError, match="1 usable models leave none for val, test"):
        preview(Inputs.of(discover(zoo.path), TokensConfig(), zoo.path))


def test_preview_refuses_a_zoo_that_cannot_be_read(new_zoo: Callable):
    zoo = new_zoo(models=3, epochs=1)
    for path in zoo.path.rglob("checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the first 3 checkpoints can be read"):
        preview(Inputs.of(discover(zoo.path), TokensConfig(), zoo.path))


def test_the_index_is_json_for_everyone(shared_store: TokenStore, shared_zoo):
    index = json.loads((shared_store.path / "store.json").read_text())
    assert index["format"] == "sane_ray token store" and index["version"] == 2
    assert index["inputs"]["source"] == str(shared_zoo.path) and index["inputs"]["tokens"]["dtype"] == "float16"
    assert index["split"]["seed"] == 0 and index["left_out"] == {"unusable": 0, "not wanted": 0, "not read": 0}


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_decide_what_an_index_stands_for(tmp_path: Path, index: str):
    (tmp_path / index).write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"x" * 1000)
    before = look(str(tmp_path / index))
    assert before[0] >= 1000
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"y" * 1001)
    assert look(str(tmp_path / index)) != before
