"""A zoo of small networks, its store, and the folder of a model; tests only read them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from embedding_networks import make_model, make_store, write_zoo


@pytest.fixture(scope="session")
def known_zoo(tmp_path_factory):
    return write_zoo(tmp_path_factory.mktemp("embedding") / "zoo")


@pytest.fixture(scope="session")
def known_store(known_zoo, tmp_path_factory):
    return make_store(known_zoo, tmp_path_factory.mktemp("embedding") / "store")


@pytest.fixture(scope="session")
def model(known_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding") / "model"
    make_model(known_store).save_pretrained(folder)
    return folder
