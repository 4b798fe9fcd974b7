"""Maps keep the largest differences; neighbours are the nearest of other models, alike in what embeddings know."""

import numpy as np
import pyarrow as pa
import pytest

from sane_ray.analysis import maps
from sane_ray.analysis.maps import close_map, nearest, places, principal_map, typical_distance
from sane_ray.analysis.tables import agreement, neighbour_table
from sane_ray.errors import InputError


def test_places_are_standardised_and_without_what_never_varies(write_embeddings, tmp_path):
    found = places(write_embeddings(tmp_path / "e"))
    assert found.shape == (18, 8)
    assert np.allclose(found.mean(axis=0), 0, atol=1e-6) and np.allclose(found.std(axis=0), 1)
    assert places(write_embeddings(tmp_path / "one", models=1, epochs=1)).shape == (1, 0)


def test_a_map_is_the_plane_of_largest_variance():
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(50, 4)) * [10, 3, 0.1, 0.1]
    found = principal_map(wide)
    assert np.allclose(np.abs(np.corrcoef(found.points_R2[:, 0], wide[:, 0])[0, 1]), 1, atol=0.01)
    assert found.explained[0] == pytest.approx(100 / 109, abs=0.05) and sum(found.explained) > 0.99
    assert principal_map(wide[:, :1]).points_R2[:, 1].tolist() == [0] * 50
    for few in (wide[:2], wide[:, :0]):
        with pytest.raises(InputError, match="at least 3 networks"):
            principal_map(few)


def test_a_close_map_keeps_groups_together_and_is_the_same_again():
    generator = np.random.default_rng(0)
    groups = np.concatenate([generator.normal(size=(8, 5)), generator.normal(size=(8, 5)) + 20])
    found = close_map(groups)
    assert np.array_equal(found, close_map(groups))
    assert [one.row < 8 for row in range(16) for one in nearest(found, row, 3)] == [True] * 24 + [False] * 24


@pytest.mark.parametrize("count", [5, 7])
def test_a_close_map_is_of_few_networks_and_of_one_direction_too(count):
    assert np.isfinite(close_map(np.arange(float(count))[:, None])).all()
    assert close_map(np.zeros((4, 2))) is None and close_map(np.zeros((9, 0))) is None


def test_a_close_map_of_many_is_of_a_sample(monkeypatch):
    monkeypatch.setattr(maps, "MOST_CLOSE", 10)
    found = close_map(np.random.default_rng(0).normal(size=(30, 3)))
    known = np.isfinite(found)
    assert known[:, 0].sum() == 10 and np.array_equal(known[:, 0], known[:, 1])


def test_the_nearest_come_first_and_are_of_other_models():
    line = np.array([[0.0], [1.0], [3.0], [3.5], [9.0]])
    assert [one.row for one in nearest(line, 2, 3)] == [3, 1, 0]
    assert [one.row for one in nearest(line, 2, 9, models=["a", "b", "c", "c", "d"])] == [1, 0, 4]
    assert nearest(line, 2, 1, unit=0.25)[0].distance == 2
    assert nearest(line, 0, 1)[0].distance == pytest.approx(1 / typical_distance(line))
    assert nearest(line[:1], 0) == []


def test_the_unit_is_the_median_distance():
    generator = np.random.default_rng(1)
    points = generator.normal(size=(60, 2))
    every = np.linalg.norm(points[:, None] - points[None], axis=2)[np.triu_indices(60, 1)]
    assert typical_distance(points) == pytest.approx(np.median(every), rel=0.05)
    assert typical_distance(points[:1]) == typical_distance(np.zeros((5, 2))) == 1


def test_neighbours_are_of_last_checkpoints_and_alike_in_what_embeddings_know(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=12)
    line = embeddings.vectors("mean")[:, :1].astype(float)
    table = neighbour_table(embeddings.models, line, count=2)
    rows = table.to_pylist()
    assert len(rows) == 24 and rows[0]["id"] == "m0/2" and [row["rank"] for row in rows[:2]] == [1, 2]
    assert all(row["neighbour"].partition("/")[0] == row["model"] != row["id"].partition("/")[0] for row in rows)
    assert all(first["distance"] <= second["distance"] for first, second in zip(rows[::2], rows[1::2], strict=True))
    alike = agreement(embeddings.models, table, embeddings.models["property.test_acc"].to_pylist())
    assert alike["nearest"] < 0.3 * alike["others"]
    assert agreement(embeddings.models, table, [None] * 36) is None
    assert len(neighbour_table(embeddings.models.slice(0, 0), line[:0])) == 0


def test_neighbours_of_the_only_model_are_none():
    models = pa.table({"id": ["a/0", "a/1"], "model": ["a", "a"], "epoch": [0, 1]})
    assert len(neighbour_table(models, np.zeros((2, 1)))) == 0
