from collections.abc import Callable

import torch

from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.summary import summarize


def test_a_summary_names_what_the_store_holds(shared_store: TokenStore):
    text = summarize(shared_store)
    lines = [line.split() for line in text.splitlines()]
    train = shared_store.counts("train")
    numbers = [f"{number:,}" for number in (train.models, train.checkpoints, train.tokens, train.parameters)]
    assert next(line for line in lines if line[:1] == ["train"])[:5] == ["train", *numbers]
    assert next(line for line in lines if "conv.weight" in line)[:8] == [
        "0",
        "conv.weight",
        "+",
        "bias",
        "conv",
        "4x1x3x3",
        "4",
        "1",
    ]
    assert "norm.num_batches_tracked []: torch.int64 is not floating point" in text
    assert "17 values of float16" in text and "standardize, per layer, from the train split" in text
    assert ["property.test_acc", "20", "0.25", "to", "0.26"] in lines
    assert ["config.model::type", "20", "CNN"] in lines and "left out" not in text


def test_a_summary_lists_what_was_left_out(ray_session: object, new_zoo: Callable):
    zoo = new_zoo(models=3, epochs=1)
    zoo.add("bad", 0, zoo.weights(1) | {"head.bias": torch.tensor([torch.nan] * 3)})
    text = summarize(zoo.prepare("store", max_skipped=0.5))
    assert "left out: 1 checkpoints of the zoo" in text
    assert "bad/checkpoint_000000/checkpoints: head.bias holds NaN or infinite values" in text
