"""One small zoo of real networks and its token store, which tests of this folder only read."""

import pytest

from sane_ray.config import TokensConfig, ZooConfig
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.builder import build_zoo
from sane_ray.zoo.catalog import discover

ZOO = ZooConfig(models=8, checkpoint_epochs=[0, 1])
TOKENS = TokensConfig(split=[0.5, 0.25, 0.25])


@pytest.fixture(scope="session")
def zoo(ray_session, tmp_path_factory):
    return build_zoo(ZOO, tmp_path_factory.mktemp("zoos") / "digits")


@pytest.fixture(scope="session")
def store(zoo, tmp_path_factory):
    return write_store(discover(zoo), tmp_path_factory.mktemp("stores") / "digits", TOKENS, source=zoo)
