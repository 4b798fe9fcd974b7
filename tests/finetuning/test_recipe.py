import pytest
import torch

from sane_ray.config import FinetuningConfig
from sane_ray.errors import InputError
from sane_ray.finetuning.recipe import describe, optimizer_of, recipe_of

STORE = {"optim::optimizer": "SGD", "optim::lr": 0.1, "optim::wd": 5e-4, "training::batchsize": 128, "model::type": "x"}


def test_the_store_says_how_networks_are_trained():
    config = FinetuningConfig()
    recipe = recipe_of(STORE, config)
    assert recipe == STORE | {"optim::optimizer": "sgd", "optim::momentum": 0.9}
    assert recipe_of(STORE | {"optim::momentum": 0.5}, config)["optim::momentum"] == 0.5
    words = describe(recipe, STORE, config)
    assert "constant learning rate 0.1 (of the best anchor)" in words and "momentum 0.9 (default)" in words


def test_what_it_does_not_say_has_defaults():
    recipe = recipe_of({"optim::lr": None, "optim::wd": float("nan")}, FinetuningConfig())
    assert recipe == {
        "optim::optimizer": "adam", "optim::lr": 1e-3, "optim::wd": 0.0, "optim::momentum": 0.9,
        "training::batchsize": 32,
    }  # fmt: skip
    words = describe(recipe, {}, FinetuningConfig())
    assert words.count("(default)") == 4 and "optimizer adam" in words and "momentum" not in words


def test_the_config_overrides():
    config = FinetuningConfig(optimizer="adamw", weight_decay=0.0, batch_size=7)
    recipe = recipe_of(STORE, config)
    assert recipe["optim::lr"] == 1e-3, "a rate for sgd is none for adamw"
    assert recipe["optim::wd"] == 0 and recipe["training::batchsize"] == 7
    words = describe(recipe, STORE, config)
    assert "constant learning rate 0.001 (default)" in words and "batches of 7 (as chosen)" in words
    assert recipe_of(STORE, FinetuningConfig(learning_rate=0.3))["optim::lr"] == 0.3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim::optimizer": "rmsprop"}, "'rmsprop', which is none of adam, adamw, sgd: choose one with"),
        ({"optim::lr": "fast"}, "optim::lr 'fast' .*no number"),
    ],
)
def test_what_is_not_known_is_told(changed, message):
    with pytest.raises(InputError, match=message):
        recipe_of(STORE | changed, FinetuningConfig())


def test_optimisers_are_those_of_torch():
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        recipe = recipe_of({}, FinetuningConfig(optimizer=name, learning_rate=0.5, weight_decay=0.25))
        optimizer = optimizer_of(recipe, [torch.zeros(2, requires_grad=True)])
        assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.5
        assert optimizer.defaults["weight_decay"] == 0.25 and optimizer.defaults.get("momentum", 0.9) == 0.9
