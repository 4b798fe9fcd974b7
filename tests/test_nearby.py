"""What lies near a path that is not what it was named for."""

import json

import pytest
from safetensors.torch import save_file
from torch import zeros

from sane_ray.config import TokensConfig
from sane_ray.embedding import Embeddings
from sane_ray.errors import InputError
from sane_ray.nearby import is_zoo
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover


def make_zoo(folder):
    folder.mkdir(parents=True)
    for number in range(8):
        save_file({"fc.weight": zeros(3, 2) + number}, folder / f"{number}.safetensors")
    return folder


@pytest.fixture
def results(tmp_path):
    """A folder with a zoo and its store."""
    zoo = make_zoo(tmp_path / "zoos" / "digits")
    write_store(discover(zoo), tmp_path / "stores" / "digits", TokensConfig(), source=zoo)
    return tmp_path


def test_stores_near_a_wrong_one_are_listed(results):
    stores = results / "stores"
    with pytest.raises(InputError, match=f"digit does not exist: .*; near it are {stores / 'digits'}$"):
        TokenStore.open(stores / "digit")
    with pytest.raises(InputError, match=f"is not a complete token store .*; near it are {stores / 'digits'}$"):
        TokenStore.open(results)


def test_zoos_near_a_wrong_source_are_listed(results):
    zoos = results / "zoos"
    with pytest.raises(InputError, match=f"digit does not exist .*; near it are {zoos / 'digits'}$"):
        discover(zoos / "digit")
    (zoos / "empty").mkdir()
    with pytest.raises(InputError, match=f"empty holds no checkpoints: .*; near it are {zoos / 'digits'}$"):
        discover(zoos / "empty")


def test_a_zoo_is_told_from_a_model_and_its_pieces(tmp_path):
    assert is_zoo(make_zoo(tmp_path / "files"))
    for name in ("one", "two"):
        (tmp_path / "tune" / name).mkdir(parents=True)
        for file in ("params.json", "result.json"):
            (tmp_path / "tune" / name / file).touch()
    assert is_zoo(tmp_path / "tune") and not is_zoo(tmp_path / "tune" / "one") and not is_zoo(tmp_path / "absent")
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "config.json").write_text(json.dumps({"layout": 1, "zoo": {}, "images": {}}))
    assert is_zoo(tmp_path / "built")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    assert not is_zoo(tmp_path / "model")


def test_a_store_in_place_of_embeddings_is_not_written_into(results):
    store = results / "stores" / "digits"
    with pytest.raises(InputError) as refusal:
        Embeddings.open(store)
    command = f"embed it with `python jobs/embed.py --model MODEL --store {store}`"
    assert str(refusal.value) == f"{store} is a token store, no embeddings: {command}"
    with pytest.raises(InputError, match=r"holds no embeddings .*: name a folder that jobs/embed") as refusal:
        Embeddings.open(results / "zoos" / "digits")
    assert "--output" not in str(refusal.value)


def test_embeddings_near_a_wrong_folder_are_listed(tmp_path):
    (tmp_path / "embeddings" / "digits").mkdir(parents=True)
    (tmp_path / "embeddings" / "digits" / "embeddings.json").touch()
    with pytest.raises(InputError, match=r"digit does not exist: make .*--output .*digit`; near it are .*digits$"):
        Embeddings.open(tmp_path / "embeddings" / "digit")
