"""Stores and embeddings that other tests write too: networks whose properties follow from their weights."""

import importlib.util
from pathlib import Path

import pytest

from sane_ray.embedding import Embeddings

SPEC = importlib.util.spec_from_file_location("analysis_zoos", Path(__file__).parents[1] / "properties" / "zoos.py")
assert SPEC is not None and SPEC.loader is not None
_zoos = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(_zoos)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """20 models of 3 checkpoints, one architecture of two layers."""
    folder = tmp_path_factory.mktemp("analysis")
    return _zoos.write(folder / "store", _zoos.write_zoo(folder / "zoo"))


@pytest.fixture(scope="session")
def embedded(store):
    """Its embeddings, complete as jobs/embed.py writes them."""
    return Embeddings.open(_zoos.write_embeddings(store.path.parent / "embeddings", store))
