import datetime
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sane_ray.errors import InputError
from sane_ray.zoo.catalog import (
    Record,
    _final,
    catalog_source,
    discover,
    join_properties,
    open_record,
    passed_over,
    read_catalog,
    reader_names,
    unclaimed,
    write_catalog,
)


def add(root: Path, model: str, epoch: int) -> Path:
    folder = root / model / f"checkpoint_{epoch:06d}"
    folder.mkdir(parents=True)
    torch.save({"weight": torch.full((2, 2), float(epoch))}, folder / "checkpoints")
    return folder / "checkpoints"


def loose(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.ones(2, 2)}, root / name)
    return root


def table(path: Path, text: str) -> Path:
    path.write_text(text.replace(" ", ""), encoding="utf-8")
    return path


class TestDiscover:
    def test_order_is_by_model_and_epoch_whatever_came_first(self, tmp_path: Path):
        for model, epoch in [("b", 10), ("b", 2), ("a", 0), ("c", 1), ("b", 0)]:
            add(tmp_path, model, epoch)
        records = discover(tmp_path)
        assert [record.id for record in records] == ["a/0", "b/0", "b/2", "b/10", "c/1"]
        assert [record.epoch for record in records] == [0, 0, 2, 10, 1]
        assert all(Path(record.path).is_absolute() and Path(record.path).is_file() for record in records)

    def test_particular_formats_come_before_loose_files(self, tmp_path: Path):
        add(loose(tmp_path, "extra/net.pt"), "model", 1)
        assert {record.reader for record in discover(tmp_path)} == {"tune"}
        assert {record.reader for record in discover(tmp_path, reader="files")} == {"files"}

    def test_one_file_is_a_source(self, tmp_path: Path):
        save_file({"weight": torch.ones(3)}, tmp_path / "net.safetensors")
        (record,) = discover(tmp_path / "net.safetensors", reader="files")
        assert record.path == str(tmp_path / "net.safetensors")
        assert open_record(record).tensor("weight").tolist() == [1, 1, 1]

    def test_missing_folder(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"--source .*zoo does not exist.*build_zoo"):
            discover(tmp_path / "zoo")

    def test_empty_zoo_says_what_every_reader_looked_for(self, tmp_path: Path):
        with pytest.raises(
            InputError, match=r"holds no checkpoints: looked for .*checkpoint_<epoch>.*a catalog"
        ) as info:
            discover(tmp_path)
        assert ".safetensors" in str(info.value)
        assert "weights.npy" in str(info.value)

    def test_folders_without_any_weights_are_an_empty_zoo(self, tmp_path: Path):
        (tmp_path / "model" / "checkpoint_000001").mkdir(parents=True)
        (tmp_path / "model" / "params.json").write_text("{}")
        with pytest.raises(InputError, match="holds no checkpoints"):
            discover(tmp_path)

    def test_chosen_reader_that_finds_nothing(self, tmp_path: Path):
        loose(tmp_path, "net.pt")
        with pytest.raises(InputError, match=r"looked for model folders with checkpoint_.*leave --reader at auto"):
            discover(tmp_path, reader="tune")

    def test_unknown_reader_lists_those_that_there_are(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"--reader is 'tuna': choose auto, catalog, .*tune.*files"):
            discover(tmp_path, reader="tuna")
        assert reader_names()[0] == "catalog"
        assert reader_names()[-1] == "files"

    def test_record_of_no_reader(self):
        with pytest.raises(InputError, match=r"/net\.xyz: its reader is 'xyz'; put one of .*tune"):
            open_record(Record("net/0", "net", 0, "/net.xyz", reader="xyz"))

    def test_file_names_that_are_no_utf8_are_listed_under_names_that_are(self, tmp_path: Path):
        for name in (os.fsdecode(b"caf\xe9"), "tea"):
            (tmp_path / name).mkdir()
            save_file({"weight": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
        records = discover(tmp_path, reader="huggingface")
        assert [record.model for record in records] == ["caf\\udce9", "tea"]
        write_catalog(tmp_path / "c.parquet", records, {})
        assert [record.model for record in read_catalog(tmp_path / "c.parquet")] == ["caf\\udce9", "tea"]

    def test_text_that_is_no_utf8_is_cleaned_in_every_field(self, tmp_path: Path):
        base = tmp_path / "finetuning" / os.fsdecode(b"b\xff") / "m"
        add(base.parent, "m", 1)
        (base / "params.json").write_text(
            '{"license": "\\ud800", "model::type": "\\ud801", "\\ud802": 10000000000000000000}'
        )
        (base / "result.json").write_text('{"training_iteration": 1, "note": "\\udfff", "huge": 1%s}' % ("0" * 400))
        records = discover(tmp_path)
        (record,) = records
        assert record.model == "finetuning/b\\udcff/m" and record.parents == ("b\\udcff",)
        assert record.license == "\\ud800" and record.config["model::type"] == "\\ud801"
        assert record.properties["note"] == "\\udfff" and record.properties["huge"] == math.inf
        assert record.config["\\ud802"] == 1e19
        assert open_record(record).tensor("weight").tolist() == [[1, 1], [1, 1]]
        write_catalog(tmp_path / "c.parquet", records, {})
        assert read_catalog(tmp_path / "c.parquet")[0].config == record.config

    @pytest.mark.parametrize("epoch", [-5, 10**30, 2**63, True, "3", 0.5, math.nan, None])
    def test_an_epoch_that_is_none_loses_no_checkpoint(self, epoch: object, caplog):
        records = [Record("a/1", "a", 1, "/a.pt"), Record("a/x", "a", epoch, "/odd.pt")]  # type: ignore[arg-type]
        assert [(record.id, record.epoch) for record in _final(records)] == [("a/1", 1), ("a/x", 0)]
        assert "the epoch of 1 checkpoints is no whole number of 64 bits, and taken as 0: /odd.pt (" in caplog.text

    def test_settings_that_are_shared_stay_so(self):
        config = {"name": "\ud800", "lr": np.float64(0.1)}
        records = list(_final([Record(f"a/{i}", "a", i, "/a", config=config) for i in range(3)]))
        assert {id(record.config) for record in records} == {id(records[0].config)}
        assert records[0].config == {"name": "\\ud800", "lr": 0.1} and type(records[0].config["lr"]) is float

    def test_files_that_no_record_stands_for(self, tmp_path: Path):
        add(loose(tmp_path, "extra/net.pt", "best.ckpt"), "model", 1)
        assert unclaimed(tmp_path, discover(tmp_path)) == ["best.ckpt", "extra/net.pt"]
        assert unclaimed(tmp_path, discover(tmp_path, reader="files")) == ["model/checkpoint_000001/checkpoints"]
        assert unclaimed(tmp_path / "best.ckpt", []) == []

    def test_shards_of_an_index_and_files_in_a_claimed_folder_are_claimed(self, tmp_path: Path):
        loose(tmp_path, "big/model-00001-of-00002.bin", "big/other.bin", "whole/deep/net.pt", "big-00001-of-00002.bin")
        index = tmp_path / "big" / "pytorch_model.bin.index.json"
        records = [Record("big/0", "big", 0, str(index)), Record("whole/0", "whole", 0, str(tmp_path / "whole"))]
        assert unclaimed(tmp_path, records) == ["big-00001-of-00002.bin", "big/other.bin"]

    def test_whatever_looks_like_weights_and_was_not_read_is_listed(self, tmp_path: Path):
        names = ["weights.npy", "more.npz", "zoo.zip", "z.tar", "z.tar.gz", "z.TGZ", "z.tar.zst", "lost/checkpoints"]
        names += ["optimizer.pt", "far/scaler.pt", "far/net_optim.pt"]
        for name in [*names, "notes.txt", "metrics.csv.gz", "checkpoints.md", ".hidden.pt", ".git/a.pt"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        add(tmp_path, "runs/model", 1)
        assert unclaimed(tmp_path, discover(tmp_path)) == sorted(names)
        assert passed_over(tmp_path, discover(tmp_path)) == []

    def test_state_of_training_beside_the_weights_is_listed_apart(self, tmp_path: Path):
        loose(
            tmp_path, "run/model.pt", "run/optimizer.pt", "run/global_step5/zero_optim_states.pt", "run/rng_state_0.pth"
        )
        loose(tmp_path, "other/optimizer.pt", "run/a/b/scheduler.pt")
        records = discover(tmp_path)
        assert passed_over(tmp_path, records) == [
            "run/global_step5/zero_optim_states.pt", "run/optimizer.pt", "run/rng_state_0.pth",
        ]  # fmt: skip
        assert unclaimed(tmp_path, records) == ["other/optimizer.pt", "run/a/b/scheduler.pt"]
        assert passed_over(tmp_path / "run/model.pt", records) == []

    def test_every_file_is_listed_once_and_none_that_a_link_reads(self, tmp_path: Path):
        blob = loose(tmp_path, "blobs/x.bin", "zoo/spare.pt") / "blobs" / "x.bin"
        zoo = tmp_path / "zoo"
        (zoo / "model.bin").symlink_to(blob)
        (zoo / "again.pt").symlink_to(zoo / "spare.pt")
        (zoo / "gone.pt").symlink_to(tmp_path / "nowhere")
        records = [record for record in discover(zoo, reader="files") if record.model == "model"]
        assert unclaimed(zoo, records) == ["gone.pt", "spare.pt"]
        alias = tmp_path / "alias"
        alias.symlink_to(zoo)
        assert unclaimed(alias, records) == ["gone.pt", "spare.pt"]

    def test_shards_and_files_beside_a_record_are_claimed(self, tmp_path: Path):
        loose(tmp_path, *(f"m/net-0000{i}-of-00003.bin" for i in (1, 2, 3)), "m/net-00001-of-00002.bin", "x.npy")
        (refused, _) = discover(tmp_path, reader="files")
        refused = replace(refused, path=str(tmp_path / "m/net-00001-of-00003.bin"), beside=(str(tmp_path / "x.npy"),))
        assert unclaimed(tmp_path, [refused]) == ["m/net-00001-of-00002.bin"]


class TestJoin:
    def test_rows_are_joined_by_path(self, tmp_path: Path):
        records = discover(loose(tmp_path / "zoo", "a/one.pt", "a/two.pt", "b.pt"))
        path = table(
            tmp_path / "known.csv",
            """path,test_acc,converged,optimizer,born,config.lr,license,nothing
            a/one.pt,0.5,true,adam,2024-12-31,1,mit,
            ./a//two.pt,nan,false,sgd,2025-01-01,2,,
            """,
        )
        one, two, other = join_properties(records, path, tmp_path / "zoo")
        assert one.properties == {
            "test_acc": 0.5, "converged": True, "optimizer": "adam", "born": "2024-12-31", "nothing": None,
        }  # fmt: skip
        assert one.config == {"lr": 1}
        assert (one.license, two.license) == ("mit", None)
        assert math.isnan(two.properties["test_acc"])
        assert other == records[2]

    def test_rows_without_records_and_records_without_rows_are_counted(self, tmp_path: Path, caplog):
        records = discover(loose(tmp_path / "zoo", "a.pt", "b.pt"))
        path = table(tmp_path / "known.csv", "path,x\na.pt,1\ngone.pt,2\nlost.pt,3\n")
        with caplog.at_level(logging.WARNING):
            join_properties(records, path, tmp_path / "zoo")
        assert "2 rows match no checkpoint, for example gone.pt" in caplog.text
        assert "no row for 1 checkpoints, for example b/0" in caplog.text

    def test_parquet_with_values_of_any_type(self, tmp_path: Path):
        records = discover(loose(tmp_path / "zoo", "a.pt"))
        columns = {
            "path": ["a.pt"],
            "when": pa.array([datetime.datetime(2024, 5, 1, 12, 30)], pa.timestamp("ns")),
            "kind": pa.array(["cnn"]).dictionary_encode(),
            "half": pa.array(np.array([0.5], np.float16)),
            "price": pa.array(["1.25"]).cast(pa.decimal128(10, 2)),
            "sizes": [[3, 5]],
            "big": pa.array([2**63], pa.uint64()),
        }
        pq.write_table(pa.table(columns), tmp_path / "known.parquet")
        (record,) = join_properties(records, tmp_path / "known.parquet", tmp_path / "zoo")
        assert record.properties == {
            "when": "2024-05-01T12:30:00", "kind": "cnn", "half": 0.5, "price": 1.25, "sizes": "[3, 5]", "big": 2**63,
        }  # fmt: skip

    def test_a_row_of_a_folder_is_about_all_in_it_that_has_no_row_of_its_own(self, tmp_path: Path):
        records = discover(loose(tmp_path / "zoo", "a/x/one.pt", "a/x/two.pt", "a/three.pt"))
        path = table(tmp_path / "known.csv", "path,v\na,1\na/x,2\na/x/two.pt,3\n")
        joined = join_properties(records, path, tmp_path / "zoo")
        assert {record.model: record.properties["v"] for record in joined} == {"a/three": 1, "a/x/one": 2, "a/x/two": 3}

    def test_files_in_an_archive(self, tmp_path: Path):
        archive = str(tmp_path / "park.zip")
        records = [Record(f"{name}/0", name, 0, archive, member=f"runs/{name}.pt") for name in "abc"]
        path = table(tmp_path / "known.csv", "path,v\npark.zip,0\npark.zip/runs/a.pt,1\nruns/b.pt,2\n")
        assert [record.properties["v"] for record in join_properties(records, path, archive)] == [1, 2, 0]

    def test_rows_are_joined_by_model_and_epoch(self, tmp_path: Path):
        for epoch in (0, 5):
            add(tmp_path / "zoo", "007", epoch)
        by_both = table(tmp_path / "both.csv", "model,epoch,v\n007,5,1\n007,0,2\n")
        by_model = table(tmp_path / "model.csv", "model,v\n007,3\n")
        by_id = table(tmp_path / "id.csv", "id,v\n007/5,4\n")
        records = discover(tmp_path / "zoo")

        def joined(path: Path) -> list[object]:
            return [record.properties.get("v") for record in join_properties(records, path, tmp_path / "zoo")]

        assert joined(by_both) == [2, 1]
        assert joined(by_model) == [3, 3]
        assert joined(by_id) == [None, 4]

    def test_fields_of_a_record(self, tmp_path: Path):
        records = discover(loose(tmp_path / "zoo", "a.pt", "b.pt", "c.pt"))
        path = table(tmp_path / "k.csv", "path,model,epoch,split\na.pt,net,20,valid\nb.pt,net,3,\nc.pt,,,Test\n")
        joined = join_properties(records, path, tmp_path / "zoo")
        assert [(r.id, r.model, r.epoch, r.split) for r in joined] == [
            ("c/0", "c", 0, "test"), ("net/3", "net", 3, None), ("net/20", "net", 20, "val"),
        ]  # fmt: skip
        assert all(record.properties == {} for record in joined)

    def test_nothing_new_replaces_nothing_known(self, tmp_path: Path):
        records = [Record("a/0", "a", 0, str(tmp_path / "a.pt"), {"x": 1, "y": 2})]
        (joined,) = join_properties(records, table(tmp_path / "k.csv", "path,x,y,z\na.pt,,3,\n"), tmp_path)
        assert joined.properties == {"x": 1, "y": 3, "z": None}

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("file,x\na.pt,1\n", "has no column path, id or model, only file, x; add a column path"),
            ("path,x\na.pt,1\n./a.pt,2\n", "has two rows for a.pt"),
            ("path,x\na.pt,1\n,2\n", "row 2 has no path"),
            ("path,x\nzoo/a.pt,1\n", "none of its 1 rows.*path is 'zoo/a.pt' where the first checkpoint is 'a.pt'"),
            ("path,x\n", "none of its 0 rows"),
            ("path,x,x\na.pt,1,2\n", "has 1 columns twice"),
            ("path,split\na.pt,training\n", "a/0: its split is 'training'; make it train, val or test"),
            ("path,epoch\na.pt,1.5\n", "a/0: its epoch is 1.5; make it a whole number"),
            ("path,epoch\na.pt,nan\n", "its epoch is nan"),
            ("path,epoch\na.pt,1e300\n", "a/0: its epoch is 1e\\+300; make it a whole number from 0 to"),
            ("path,epoch\na.pt,-1\n", "a/0: its epoch is -1; make it a whole number"),
            ("path,x\na.pt\n", "not a readable CSV or Parquet file"),
            ("path,model\na.pt,same\nb.pt,same\n", "2 checkpoints have the id 'same/0'"),
        ],
    )
    def test_tables_that_cannot_be_used(self, tmp_path: Path, text: str, problem: str):
        records = discover(loose(tmp_path / "zoo", "a.pt", "b.pt"))
        with pytest.raises(InputError, match=problem):
            join_properties(records, table(tmp_path / "known.csv", text), tmp_path / "zoo")

    def test_table_that_is_not_there(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"known\.csv: no such file"):
            join_properties([Record("a/0", "a", 0, "/a.pt")], tmp_path / "known.csv", tmp_path)


RECORDS = [
    Record("a/0", "a", 0, "/zoo/a.pt", {"acc": 0.5, "ok": True, "mixed": 1, "n": 3}, {"seed": 1}, license="mit"),
    Record("b/7", "b", 7, "/zoo/b.zip", {"acc": math.nan, "mixed": "one"}, {"seed": 2}, "tune", "b.pt", split="val"),
    Record("c/9", "c", 9, "/zoo/ü.pt", {"n": 4, "huge": 10**30}, {"model::nlin": "tanh"}, "files", parents=("x", "y")),
]  # fmt: skip


class TestCatalogFile:
    def test_round_trip(self, tmp_path: Path):
        write_catalog(tmp_path / "new" / "catalog.parquet", RECORDS, {})
        a, b, c = read_catalog(tmp_path / "new" / "catalog.parquet")
        assert a == replace(RECORDS[0], properties=RECORDS[0].properties | {"mixed": "1"})  # a column has one type
        assert math.isnan(b.properties.pop("acc"))
        assert b == replace(RECORDS[1], properties={"mixed": "one"})
        assert c == replace(RECORDS[2], properties={"n": 4, "huge": str(10**30)})

    def test_columns_have_types_that_any_program_reads(self, tmp_path: Path):
        more = {"sha256": ["x", "", "z"], "bytes": [1, 2, None], "status": ["kept"] * 3, "seen": [True, None, False]}
        write_catalog(tmp_path / "c.parquet", RECORDS, more)
        kinds = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "c.parquet")}
        assert {name: kinds[name] for name in ("epoch", "parents", "bytes", "seen", "property.acc", "config.seed")} == {
            "epoch": "int64", "parents": "list<element: string>", "bytes": "int64", "seen": "bool",
            "property.acc": "double", "config.seed": "int64",
        }  # fmt: skip
        assert kinds["property.mixed"] == "string"
        assert [path.name for path in tmp_path.iterdir()] == ["c.parquet"]

    def test_catalog_edited_with_pandas(self, tmp_path: Path):
        write_catalog(tmp_path / "c.parquet", RECORDS, {"status": ["kept"] * 3})
        frame = pd.read_parquet(tmp_path / "c.parquet").sort_values("epoch", ascending=False)
        frame.loc[frame["model"] == "a", "status"] = "left out"
        frame["epoch"] = frame["epoch"].astype(float)
        frame["property.n"] = frame["property.n"].fillna(-1)
        frame.drop(columns=["member", "license", "split"]).to_parquet(tmp_path / "edited.parquet")
        c, b = read_catalog(tmp_path / "edited.parquet")
        assert (c.id, c.epoch, c.parents, c.license, c.properties["n"]) == ("c/9", 9, ("x", "y"), None, 4)
        assert (b.id, b.member, b.split, b.properties["n"]) == ("b/7", "", None, -1)

    def test_catalog_is_a_source_for_the_zoo(self, tmp_path: Path):
        add(tmp_path / "zoo", "m", 1)
        add(tmp_path / "zoo", "m", 0)
        records = discover(tmp_path / "zoo")
        write_catalog(tmp_path / "c.parquet", records[::-1], {"status": ["left out", "kept"]})
        (record,) = discover(tmp_path / "c.parquet")
        assert record == records[0]
        assert open_record(record).tensor("weight").tolist() == [[0, 0], [0, 0]]
        assert discover(tmp_path / "c.parquet", reader="catalog") == [record]

    def test_a_zoo_moves_with_the_catalog_in_it(self, tmp_path: Path):
        add(tmp_path / "zoo", "m", 1)
        write_catalog(tmp_path / "zoo" / "c.parquet", discover(tmp_path / "zoo"), {})
        assert pq.read_table(tmp_path / "zoo" / "c.parquet")["path"].to_pylist() == ["m/checkpoint_000001/checkpoints"]
        (tmp_path / "zoo").rename(tmp_path / "moved")
        (record,) = discover(tmp_path / "moved" / "c.parquet")
        assert record.path == str(tmp_path / "moved" / "m" / "checkpoint_000001" / "checkpoints")

    def test_a_catalog_outside_moves_while_the_zoo_stays(self, tmp_path: Path):
        path = add(tmp_path / "zoo", "m", 1)
        write_catalog(tmp_path / "lists" / "c.parquet", discover(tmp_path / "zoo"), {})
        (tmp_path / "lists" / "c.parquet").rename(tmp_path / "c.parquet")
        assert discover(tmp_path / "c.parquet")[0].path == str(path)

    def test_a_catalog_knows_what_it_is_of(self, tmp_path: Path):
        path = tmp_path / "c.parquet"
        assert catalog_source(path) is None
        write_catalog(path, RECORDS, {}, source="/zoos/ü\udcff")
        assert catalog_source(path) == catalog_source(str(path)) == "/zoos/ü\\udcff"
        assert [record.id for record in read_catalog(path)] == ["a/0", "b/7", "c/9"]
        write_catalog(path, RECORDS, {})
        assert catalog_source(path) is None
        path.write_bytes(b"PAR1")
        assert catalog_source(path) is None

    def test_a_catalog_that_was_edited_is_nobody_s(self, tmp_path: Path):
        path = tmp_path / "c.parquet"
        write_catalog(path, RECORDS, {}, source="/zoo")
        content = pq.read_table(path)
        assert content.schema.metadata  # pyarrow keeps it
        pq.write_table(content.slice(1), path)
        assert catalog_source(path) is None
        write_catalog(path, RECORDS, {}, source="/zoo")
        pd.read_parquet(path).to_parquet(path)
        assert catalog_source(path) is None

    def test_equal_settings_are_held_once(self, tmp_path: Path):
        records = [Record(f"m/{i}", "m", i, "/m", config={"seed": 1, "lr": 0.1}) for i in range(3)]
        write_catalog(tmp_path / "c.parquet", records, {})
        assert len({id(record.config) for record in read_catalog(tmp_path / "c.parquet")}) == 1

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda t: t.drop_columns("reader"), "no catalog, since it has no column reader"),
            (lambda t: pa.concat_tables([t, t]), "2 checkpoints have the id 'a/0'"),
            (lambda t: t.set_column(3, "path", pa.array(["/a", None, "/c"])), "the row of b/7 has no path"),
            (lambda t: t.append_column("status", pa.array(["left out"] * 3)), "none of its 3 rows is kept"),
            (lambda t: t.set_column(2, "epoch", pa.array([1, 2.5, 3])), "b/7: its epoch is 2.5"),
            (
                lambda t: t.drop_columns("split").append_column("split", pa.array(["train", "dev", None])),
                "b/7: its split is 'dev'",
            ),
        ],
    )
    def test_catalogs_that_cannot_be_used(self, tmp_path: Path, change, problem: str):
        write_catalog(tmp_path / "c.parquet", RECORDS, {})
        pq.write_table(change(pq.read_table(tmp_path / "c.parquet")), tmp_path / "c.parquet")
        with pytest.raises(InputError, match=problem):
            read_catalog(tmp_path / "c.parquet")

    def test_truncated_catalog(self, tmp_path: Path):
        write_catalog(tmp_path / "c.parquet", RECORDS, {})
        (tmp_path / "c.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-100])
        with pytest.raises(InputError, match="not a readable CSV or Parquet file"):
            discover(tmp_path / "c.parquet", reader="catalog")
        with pytest.raises(InputError, match=r"holds no checkpoints.*a catalog"):
            discover(tmp_path / "c.parquet")

    def test_place_that_cannot_be_written(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"c\.parquet: cannot be written"):
            write_catalog(tmp_path / "file" / "c.parquet", RECORDS, {})
