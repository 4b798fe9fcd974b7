import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("property_zoos", Path(__file__).with_name("zoos.py"))
assert SPEC is not None and SPEC.loader is not None
_zoos = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(_zoos)


@pytest.fixture(scope="session")
def zoos():
    """The functions of zoos.py."""
    return _zoos


@pytest.fixture(scope="session")
def store(zoos, tmp_path_factory):
    """20 models of 3 checkpoints, one architecture."""
    folder = tmp_path_factory.mktemp("properties")
    return zoos.write(folder / "store", zoos.write_zoo(folder / "zoo"))


@pytest.fixture(scope="session")
def embeddings(zoos, store):
    """The folder of its embeddings."""
    return zoos.write_embeddings(store.path.parent / "embeddings", store)


@pytest.fixture(scope="session")
def mixed_store(zoos, tmp_path_factory):
    """Two architectures with different numbers of layers."""
    folder = tmp_path_factory.mktemp("mixed")
    zoos.write_zoo(folder / "zoo" / "a", models=8, epochs=2)
    zoos.write_zoo(folder / "zoo" / "b", models=8, epochs=2, shapes=((6, 3), (4, 6), (3, 4)), seed=1)
    return zoos.write(folder / "store", folder / "zoo")
