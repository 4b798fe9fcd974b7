"""Tables of embeddings: from stores and checkpoints, resumed, on Ray, and with networks that cannot be embedded."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_networks import (
    first_architecture,
    known_network,
    make_model,
    make_store,
    tokens_config,
    write_zoo,
)
from safetensors.torch import save_file

from sane_ray.autoencoder.model import SANE
from sane_ray.config import EmbeddingConfig, WorkersConfig
from sane_ray.embedding import VECTORS, Embeddings, networks, parts, writing
from sane_ray.embedding.writing import embed, is_complete, plan_records, plan_store
from sane_ray.errors import InputError
from sane_ray.preflight import Resources
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

EXACT = EmbeddingConfig(precision="float32")


def of_zoo(model, zoo, output, config=EXACT):
    return plan_records(model, discover(zoo), zoo, output, config)


def same(one, other):
    """Whether two folders hold the same embeddings."""
    assert one.models.equals(other.models) and one.layers.equals(other.layers)
    return True


@pytest.fixture(scope="module")
def whole(model, known_store, tmp_path_factory):
    config = dataclasses.replace(EXACT, tokens=True, token_dtype="float32")
    return embed(plan_store(model, known_store, tmp_path_factory.mktemp("whole") / "embeddings", config))


def test_the_tables_hold_what_the_contract_says(whole, model, known_store):
    store = known_store
    trained = SANE.from_pretrained(model)
    (architecture,) = store.architectures.values()
    names = ["id", "model", "epoch", "split", "architecture", "trained_on", "parameters", "tokens"]
    assert whole.models.column_names == [*names, "reconstruction_mse", "explained_variance", *VECTORS, "shape"]
    assert whole.models["id"].equals(store.models["id"]) and whole.models["split"].equals(store.models["split"])
    assert whole.models.schema.field("q01").type == pa.list_(pa.float32(), 6)
    assert whole.layers.column_names == [
        "id", "layer", "name", "kind", "tokens", "reconstruction_mse", "explained_variance", *VECTORS, "shape",
    ]  # fmt: skip
    assert whole.layers["layer"].to_pylist()[:5] == [0, 1, 2, 3, 4] and len(whole.layers) == 12 * 5
    ids, layers = whole.layer_vectors("mean", architecture.name)
    assert ids == store.models["id"].to_pylist() and layers.shape == (12, 5, 6)
    starts = architecture.table.layer_starts
    for row in range(12):
        z = trained.encode_model(store.state_dict(row)).numpy()
        np.testing.assert_allclose(whole.vectors("mean")[row], z.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layers[row, 1], z[starts[1] : starts[2]].mean(axis=0), rtol=1e-4, atol=1e-5)
    index = whole.index
    assert index["format"] == "sane_ray embeddings" and (index["window"], index["halo"]) == (10, 0)
    assert index["quantiles"] == [0.01, 0.25, 0.5, 0.75, 0.99] and (index["latent_dim"], index["token_size"]) == (6, 24)
    assert index["source"] == {"kind": "store", "path": str(store.path), "fingerprint": store.fingerprint}
    assert index["model"]["provenance"] == {"run": "test"} and list(index["architectures"]) == [architecture.name]
    assert {path.name for path in whole.path.iterdir()} == {
        "embeddings.json", "models.parquet", "layers.parquet", "tokens",
    }  # fmt: skip


def test_tokens_are_kept_where_they_are_asked_for(whole, known_store, model):
    table = pq.read_table(whole.path / "tokens")
    assert table.column_names == ["id", "token", "layer", "channel", "embedding"]
    (architecture,) = known_store.architectures.values()
    assert len(table) == 12 * architecture.table.num_tokens
    name = known_store.models["id"][7].as_py()
    mine = table.filter(pa.compute.field("id") == name).sort_by("token")
    z = np.array(mine["embedding"].to_pylist())
    expected = SANE.from_pretrained(model).encode_model(known_store.state_dict(7)).numpy()
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    assert mine["layer"].to_numpy().tolist() == architecture.table.layer_of_token.tolist()
    assert mine["channel"].to_numpy().tolist() == architecture.table.positions[:, 2].tolist()


def test_checkpoints_as_they_are_give_what_their_store_gives(model, known_zoo, whole, tmp_path):
    found = embed(of_zoo(model, known_zoo, tmp_path / "out"))
    order = [found.models["id"].to_pylist().index(name) for name in whole.models["id"].to_pylist()]
    np.testing.assert_allclose(found.vectors("q75")[order], whole.vectors("q75"), rtol=1e-4, atol=1e-5)
    assert found.index["source"]["kind"] == "path" and found.models["split"].null_count == 12


def test_a_single_file_is_embedded_and_a_store_keeps_its_properties(model, tmp_path, known_zoo):
    one = embed(of_zoo(model, known_zoo / "knownb.safetensors", tmp_path / "one"))
    assert len(one.models) == 1 and len(one.layers) == 5 and one.models["trained_on"].to_pylist() == [True]
    records = [
        dataclasses.replace(record, properties={"test_acc": number / 12, "note": "x"})
        for number, record in enumerate(discover(known_zoo))
    ]
    store = write_store(records, tmp_path / "store", tokens_config(), source=known_zoo)
    found = embed(plan_store(model, store, tmp_path / "two", EXACT))
    assert found.models["property.test_acc"].equals(store.models["property.test_acc"])
    names = found.models.column_names
    assert names.index("tokens") < names.index("property.test_acc") < names.index("reconstruction_mse")


class Killed(BaseException):
    """As if the process ended."""


@pytest.mark.parametrize("kind", ["store", "path"])
def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(
    model, known_store, known_zoo, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(networks, "UNIT_CHECKPOINTS", 2)

    def planned(name):
        output = tmp_path / name
        if kind == "store":
            return plan_store(model, known_store, output, EXACT)
        return of_zoo(model, known_zoo, output)

    uninterrupted = embed(planned("calm"))
    embedded, real = [], writing.Worker.embed

    def until_third(self, unit):
        if len(embedded) == 3:
            raise Killed
        embedded.append(unit.number)
        return real(self, unit)

    monkeypatch.setattr(writing.Worker, "embed", until_third)
    with pytest.raises(Killed):
        embed(planned("killed"))
    with pytest.raises(InputError, match="no complete embeddings"):
        Embeddings.open(tmp_path / "killed")
    (tmp_path / "killed" / "parts" / ".000005.0a1b2c3d").mkdir()
    monkeypatch.setattr(writing.Worker, "embed", lambda self, unit: embedded.append(unit.number) or real(self, unit))
    resumed = embed(planned("killed"))
    assert sorted(embedded) == list(range(len(planned("x").units))), "each unit once"
    assert same(resumed, uninterrupted)
    assert not (tmp_path / "killed" / "parts").exists()
    before = (resumed.path / "models.parquet").stat().st_mtime_ns
    assert is_complete(planned("killed")) and same(embed(planned("killed")), resumed)
    assert (resumed.path / "models.parquet").stat().st_mtime_ns == before


def test_a_run_that_is_killed_while_it_makes_the_tables_goes_on(model, known_store, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(networks, "UNIT_CHECKPOINTS", 5)
    config = dataclasses.replace(EXACT, tokens=True, token_dtype="float32")
    plan = plan_store(model, known_store, tmp_path / "out", config)
    real = writing._index
    monkeypatch.setattr(writing, "_index", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        embed(plan)
    monkeypatch.setattr(writing, "_index", real)
    found = embed(plan)
    assert len(pq.read_table(found.path / "tokens")) == len(pq.read_table(whole.path / "tokens"))
    np.testing.assert_allclose(found.vectors("q25"), whole.vectors("q25"), atol=1e-6)


@pytest.mark.parametrize("done", ["begun", "complete"])
def test_another_model_other_networks_and_other_settings_are_refused_in_the_same_folder(
    model, known_store, known_zoo, tmp_path, monkeypatch, done
):
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    if done == "begun":
        monkeypatch.setattr(writing.Worker, "embed", lambda self, unit: "stopped")
        with pytest.raises(InputError, match="stopped"):
            embed(plan)
    else:
        embed(plan)
    other = tmp_path / "model"
    make_model(known_store, latent_dim=5).save_pretrained(other)
    for changed, message in (
        (dataclasses.replace(plan, model=other), "another model has made"),
        (of_zoo(model, known_zoo, plan.output), "are of other networks"),
        (dataclasses.replace(plan, config=EmbeddingConfig(halo=2)), r"embedding\.halo 0, which is now 2"),
    ):
        with pytest.raises(InputError, match=message):
            embed(changed)
    assert is_complete(dataclasses.replace(plan, config=dataclasses.replace(EXACT, tokens_at_once=9))) == (
        done == "complete"
    )


def test_other_files_are_never_written_among(model, known_store, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex\)"):
        embed(plan_store(model, known_store, tmp_path, EXACT))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_networks_that_cannot_be_embedded_are_named_and_the_others_are(known_store, tmp_path):
    model = tmp_path / "model"
    make_model(known_store, max_positions=[99, 9, 99]).save_pretrained(model)
    zoo = write_zoo(tmp_path / "zoo", known=3, other=1)
    save_file({"fc.weight": torch.zeros(500, 3)}, zoo / "large.safetensors")
    save_file({key: value * float("nan") for key, value in known_network().items()}, zoo / "nan.safetensors")
    (zoo / "broken.safetensors").write_bytes((zoo / "knowna.safetensors").read_bytes()[:-100])
    found = embed(of_zoo(model, zoo, tmp_path / "out"))
    reasons = {one["id"]: one["reason"] for one in found.left_out}
    assert len(found.models) == 4 and len(reasons) == 3
    assert "sinusoidal" in next(text for name, text in reasons.items() if "large" in name)
    assert "NaN" in next(text for name, text in reasons.items() if "nan" in name)
    assert any("broken" in name for name in reasons)
    assert sorted(found.models["trained_on"].to_pylist()) == [False, True, True, True]
    assert sorted(found.index["trained_on"].values()) == [False, True]


def test_if_nothing_can_be_embedded_nothing_is_left(model, tmp_path):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    save_file({"fc.weight": torch.zeros(500, 3)}, zoo / "large.safetensors")
    with pytest.raises(InputError, match=r"none of 1 checkpoints .*large.*needs 500 positions"):
        embed(of_zoo(model, zoo, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_of_a_store_of_several_architectures_those_that_fit_are_embedded(tmp_path):
    zoo = write_zoo(tmp_path / "zoo", known=6, other=6)
    store = make_store(zoo, tmp_path / "store")
    name = first_architecture(store)

    sizes = list(store.architectures[name].table.position_sizes)
    small, large = tmp_path / "small", tmp_path / "large"
    make_model(store, names=[name], max_positions=[*sizes[:2], 8]).save_pretrained(small)
    make_model(store, names=[name], max_positions=[99, 9, 99]).save_pretrained(large)
    refused = embed(plan_store(small, store, tmp_path / "one", EXACT))
    assert set(refused.models["architecture"].to_pylist()) == {name}
    assert len(refused.left_out) == store.models["architecture"].to_pylist().count(first_architecture(store, "other"))
    assert "positions of the channel" in refused.left_out[0]["reason"]
    both = embed(plan_store(large, store, tmp_path / "two", EXACT))
    assert len(both.models) == 12 and not both.left_out
    raw = embed(of_zoo(large, zoo, tmp_path / "three"))
    order = [raw.models["id"].to_pylist().index(name) for name in both.models["id"].to_pylist()]
    np.testing.assert_allclose(raw.vectors("mean")[order], both.vectors("mean"), rtol=1e-3, atol=1e-4)


def test_a_store_that_fits_nothing_is_refused_before_any_work(model, known_zoo, tmp_path):
    store = make_store(known_zoo, tmp_path / "store", token_size=30)
    with pytest.raises(InputError, match=r"tokens have 30 values, .*--tokens.token_size 24"):
        plan_store(model, store, tmp_path / "out", EXACT)


@pytest.mark.parametrize("normalization", ["standardize", "l2"])
def test_large_checkpoints_are_embedded_a_range_at_a_time_and_are_the_same(tmp_path, monkeypatch, normalization):
    zoo = write_zoo(tmp_path / "zoo")
    store = make_store(zoo, tmp_path / "store", normalization=normalization)
    make_model(store).save_pretrained(tmp_path / "model")
    config = dataclasses.replace(EXACT, halo=2, tokens_at_once=20)
    expected = embed(plan_store(tmp_path / "model", store, tmp_path / "expected", config))
    cut = make_store(zoo, tmp_path / "cut", normalization=normalization, segment_mb=1e-4, row_group_mb=7e-4)
    segments = len(cut.segments)
    assert segments >= 24, "each checkpoint in several row groups"
    found = embed(plan_store(tmp_path / "model", cut, tmp_path / "segments", config))
    np.testing.assert_allclose(found.vectors("q99"), expected.vectors("q99"), atol=1e-5)
    monkeypatch.setattr(networks, "UNIT_BYTES", 100)
    monkeypatch.setattr(networks, "tokenize", lambda *_: pytest.fail("read whole"))
    raw = embed(of_zoo(tmp_path / "model", zoo, tmp_path / "raw", config))
    order = [raw.models["id"].to_pylist().index(name) for name in expected.models["id"].to_pylist()]
    np.testing.assert_allclose(raw.vectors("q99")[order], expected.vectors("q99"), atol=1e-5)


def test_on_ray_a_pool_of_actors_gives_the_same(ray_session, model, known_store, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "UNIT_CHECKPOINTS", 2)
    here = embed(plan_store(model, known_store, tmp_path / "here", EXACT))
    plan = plan_store(model, known_store, tmp_path / "ray", EXACT)
    assert plan.is_small, "two workers are asked for, and there is work for both"
    monkeypatch.setattr(writing.Worker, "embed", lambda self, unit: "embedded in this process")
    there = embed(plan, WorkersConfig(num_workers=4))
    assert same(there, here)


def test_two_runs_never_write_one_folder(model, known_store, tmp_path):
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    with writing._held(plan.output), pytest.raises(InputError, match="another run is writing it"):
        embed(plan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "embeddings.json").unlink(), r"holds no embeddings \(embeddings.json is missing\)"),
        (lambda folder: (folder / "embeddings.json").write_text("{"), r"is not JSON"),
        (lambda folder: (folder / "embeddings.json").write_text("{}"), r"its format is not 'sane_ray embeddings'"),
        (lambda folder: (folder / "layers.parquet").write_bytes(b"PAR1"), r"layers.parquet: damaged"),
        (
            lambda folder: pq.write_table(pq.read_table(folder / "models.parquet").slice(1), folder / "models.parquet"),
            r"models.parquet: has 11 rows instead of 12",
        ),
    ],
)
def test_damaged_embeddings_are_told(model, known_store, tmp_path, damage, message):
    embed(plan_store(model, known_store, tmp_path / "out", EXACT))
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        Embeddings.open(tmp_path / "out")


def test_names_that_are_not_there_are_told(whole, tmp_path):
    with pytest.raises(InputError, match=r"no vectors 'median': take one of mean, std, q01"):
        whole.vectors("median")
    with pytest.raises(InputError, match=r"no architecture 'x': take one of"):
        whole.layer_vectors("mean", "x")
    index = json.loads((whole.path / "embeddings.json").read_text()) | {"version": 9}
    (tmp_path / "embeddings.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="version is 9, this sane_ray reads 1"):
        Embeddings.open(tmp_path)


@pytest.mark.parametrize("stored", [{}, {"normalization": "minmax"}, {"segment_mb": 1e-4, "row_group_mb": 7e-4}])
def test_a_store_of_another_zoo_gives_what_its_checkpoints_give(model, tmp_path, stored):
    zoo = write_zoo(tmp_path / "zoo", scale=2.0)
    store = make_store(zoo, tmp_path / "store", **stored)
    found, raw = embed(plan_store(model, store, tmp_path / "one", EXACT)), embed(of_zoo(model, zoo, tmp_path / "two"))
    order = [raw.models["id"].to_pylist().index(name) for name in found.models["id"].to_pylist()]
    for name in ("mean", "q99"):
        np.testing.assert_allclose(found.vectors(name), raw.vectors(name)[order], rtol=1e-4, atol=1e-5)
    errors = (one.models["reconstruction_mse"].to_numpy() for one in (found, raw))
    np.testing.assert_allclose(next(errors), next(errors)[order], rtol=1e-4)
    assert all(found.models["trained_on"].to_pylist())


def begun(plan):
    """The same embeddings, as they are after a kill within the second part."""
    real, calls = writing.Worker.embed, []

    def until_second(self, unit):
        calls.append(unit)
        if len(calls) == 2:
            raise Killed
        return real(self, unit)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(writing.Worker, "embed", until_second)
        embed(plan)


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_the_number_format_that_a_folder_was_begun_in_is_kept(model, known_store, tmp_path, monkeypatch, first):
    monkeypatch.setattr(networks, "UNIT_CHECKPOINTS", 5)
    name, other = (
        str(first).removeprefix("torch."),
        {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[first],
    )
    plan = plan_store(model, known_store, tmp_path / "auto", EmbeddingConfig())
    monkeypatch.setattr(writing, "choose_format", lambda *_: first)
    begun(plan)
    assert json.loads((plan.output / "identity.json").read_text())["settings"]["precision"] == name
    monkeypatch.setattr(writing, "choose_format", lambda *_: other)  # as on another machine
    monkeypatch.setattr("sane_ray.embedding.encoder.has_bfloat16", lambda *_: other == torch.bfloat16)
    found = embed(plan)
    said = plan_store(model, known_store, tmp_path / "said", EmbeddingConfig(precision=name))
    assert same(found, embed(said)) and found.index["settings"]["precision"] == name
    assert is_complete(plan) and is_complete(dataclasses.replace(said, output=plan.output))
    asked = dataclasses.replace(plan, config=EmbeddingConfig(precision=str(other).removeprefix("torch.")))
    with pytest.raises(InputError, match=rf"embedding\.precision '{name}', which is now"):
        embed(asked)


def test_what_the_workers_are_decides_the_number_format_not_the_driver(monkeypatch):
    monkeypatch.setattr(writing, "choose_format", lambda *_: torch.float32)
    workers = Resources(min_workers=2, max_workers=2, gpu=True, cpus_per_worker=1, data_cpus=1)
    assert writing.precision_of(workers) == "bfloat16"
    assert writing.precision_of(dataclasses.replace(workers, gpu=False)) == "float32"
    assert writing.precision_of(torch.device("cpu")) == "float32"


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A zoo of which all networks count as large, and are one unit; the last layer of one is not finite."""
    zoo = write_zoo(tmp_path / "zoo", known=4)
    broken = known_network(1)
    broken["4.weight"][:] = float("nan")
    save_file(broken, zoo / "knownb.safetensors")

    def planned(model, name="out"):
        monkeypatch.setattr(networks, "UNIT_BYTES", 64e6)
        config = dataclasses.replace(EXACT, tokens=True, tokens_at_once=10)
        plan = of_zoo(model, zoo, tmp_path / name, config)
        assert len(plan.units) == 1
        monkeypatch.setattr(networks, "UNIT_BYTES", 100)
        return plan

    return planned


def test_a_large_checkpoint_that_breaks_off_is_left_out_with_its_tokens(model, large):
    found = embed(large(model))
    (left_out,) = found.left_out
    assert "knownb" in left_out["id"] and left_out["reason"] == "holds NaN or infinite values"
    tokens = pq.read_table(found.path / "tokens")
    assert len(found.models) == 3 and set(tokens["id"].to_pylist()) == set(found.models["id"].to_pylist())
    assert len(tokens) == sum(found.models["tokens"].to_pylist())


def test_a_file_that_cannot_be_read_is_no_disk_that_cannot_be_written(model, large, monkeypatch):
    real = networks._Ranges._tokens

    def gone(self, start, stop):
        if "knownc" in str(self._record.path) and start:
            raise OSError(5, "Input/output error")
        return real(self, start, stop)

    monkeypatch.setattr(networks._Ranges, "_tokens", gone)
    found = embed(large(model))
    assert [one["reason"] for one in found.left_out if "knownc" in one["id"]] == [
        "cannot be read (OSError: [Errno 5] Input/output error)"
    ]
    assert len(found.models) == 2 and len(pq.read_table(found.path / "tokens")) == sum(
        found.models["tokens"].to_pylist()
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.Part, "_keep", full)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left.*free some space"):
        embed(large(model, "full"))


def test_a_full_disk_leaves_the_identity_as_it_was(model, known_store, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "UNIT_CHECKPOINTS", 5)
    plan, fresh = (plan_store(model, known_store, tmp_path / name, EXACT) for name in ("begun", "fresh"))
    begun(plan)
    real = Path.write_text

    def full(self, text, **options):
        real(self, text[:9], **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        for one in (plan, fresh):
            with pytest.raises(InputError, match=r"cannot be written .*No space left"):
                embed(one)
    assert not fresh.output.exists()
    assert len(embed(plan).models) == 12


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_identity_that_cannot_be_read_is_told_in_words(model, known_store, tmp_path, content):
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    plan.output.mkdir()
    (plan.output / "identity.json").write_text(content)
    with pytest.raises(InputError, match=r"identity.json .*what was being embedded there: delete .*out"):
        embed(plan)


def test_what_a_kill_leaves_of_an_identity_is_in_nobodys_way(model, known_store, tmp_path):
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    plan.output.mkdir()
    (plan.output / ".identity.json").write_text("{")
    assert len(embed(plan).models) == 12


@pytest.mark.parametrize(
    ("units", "size", "cluster", "cuda", "address", "here"),
    [
        (1, 1e3, {}, False, "", True),
        (9, 1e3, {}, False, "", True),
        (9, 1e3, {"gpu": "yes"}, False, "", False),
        (1, 1e3, {"gpu": "yes"}, False, "", False),
        (9, 1e3, {"gpu": "yes"}, True, "", True),
        (9, 1e3, {"num_workers": 2}, False, "", False),
        (9, 1e3, {"num_workers": (1, 4)}, False, "", False),
        (1, 1e3, {"num_workers": 2}, False, "", True),
        (9, 1e9, {}, True, "", False),
        (1, 14e9, {}, False, "", True),
        (1, 14e9, {}, False, "ray://head:10001", False),
        (1, 14e9, {}, True, "ray://head:10001", True),
        (1, 14e9, {"gpu": "no"}, False, "ray://head:10001", True),
    ],
)
def test_workers_that_are_asked_for_are_taken_where_they_help(
    model, known_store, tmp_path, monkeypatch, units, size, cluster, cuda, address, here
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("RAY_ADDRESS", address)
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    plan = dataclasses.replace(plan, size=size, units=plan.units[:1] * units)
    assert plan.runs_here(WorkersConfig(**cluster)) == here
    assert ("in this process" in plan.place(WorkersConfig(**cluster))) == here


def test_workers_that_cannot_help_are_told_of(model, known_store, tmp_path, caplog):
    plan = plan_store(model, known_store, tmp_path / "out", EXACT)
    plan = dataclasses.replace(plan, units=[networks.Unit(0, plan.units[0].rows, plan.units[0].groups)])
    embed(plan, WorkersConfig(num_workers=4))
    assert "cluster.num_workers is 4: they are one unit of work" in caplog.text


def test_layers_are_read_when_they_are_asked_for_and_only_the_columns_that_are(tmp_path, monkeypatch):
    store = make_store(write_zoo(tmp_path / "zoo", known=6, other=6), tmp_path / "store")
    make_model(store, max_positions=[99, 9, 99]).save_pretrained(tmp_path / "model")
    path = embed(plan_store(tmp_path / "model", store, tmp_path / "out", EXACT)).path
    expected, taken = pq.read_table(path / "layers.parquet"), []
    real_table, real_batches = pq.read_table, pq.ParquetFile.iter_batches

    def batches(self, *args, columns, **options):
        taken.append(columns)
        return real_batches(self, *args, columns=columns, batch_size=4)

    monkeypatch.setattr(
        pq, "read_table", lambda file, **options: taken.append(file.name) or real_table(file, **options)
    )
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", batches)
    found = Embeddings.open(path)
    assert found.num_layers == len(expected) and taken == ["models.parquet"]
    for architecture in found.index["architectures"]:
        ids, vectors = found.layer_vectors("std", architecture)
        rows = expected.filter(pa.compute.is_in(expected["id"], value_set=pa.array(ids)))
        assert len(rows) == vectors.shape[0] * vectors.shape[1] > 0
        assert np.array_equal(vectors.reshape(len(rows), -1), np.array(rows["std"].to_pylist(), np.float32))
        assert found.layer_columns(["name", "tokens"], architecture).equals(rows.select(["name", "tokens"]))
    assert taken[1:] == [["std", "id"], ["name", "tokens", "id"]] * 2
    assert found.layers.equals(expected)


def test_layers_that_are_fewer_than_the_networks_have_are_told(model, known_store, tmp_path):
    path = embed(plan_store(model, known_store, tmp_path / "out", EXACT)).path
    content = json.loads((path / "embeddings.json").read_text())
    content["rows"]["layers.parquet"] -= 1
    (path / "embeddings.json").write_text(json.dumps(content))
    pq.write_table(pq.read_table(path / "layers.parquet").slice(1), path / "layers.parquet")
    found = Embeddings.open(path)
    with pytest.raises(InputError, match=r"layers.parquet: damaged .*59 layers"):
        found.layer_vectors("mean", next(iter(found.index["architectures"])))


def test_the_lock_goes_while_it_is_held_and_the_empty_folder_with_it(tmp_path, monkeypatch):
    seen, real = [], writing.FileLock.release

    def release(self, *args, **options):
        seen.append(Path(self.lock_file).exists())
        real(self, *args, **options)

    monkeypatch.setattr(writing.FileLock, "release", release)
    with writing._held(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    assert seen[0] is False and not (tmp_path / "out").exists()
