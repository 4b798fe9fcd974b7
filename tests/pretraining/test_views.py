import numpy as np
import pytest
import torch

from sane_ray.pretraining.views import Mover, Permuted
from sane_ray.tokens.symmetry import Symmetry, derive_symmetry, gather_indices, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table

CHAIN = {
    "module_list.0.weight": (8, 1, 5, 5),
    "module_list.0.bias": (8,),
    "module_list.3.weight": (6, 8, 5, 5),
    "module_list.3.bias": (6,),
    "module_list.6.weight": (4, 6, 2, 2),
    "module_list.6.bias": (4,),
    "module_list.9.weight": (20, 36),
    "module_list.9.bias": (20,),
    "module_list.11.weight": (10, 20),
    "module_list.11.bias": (10,),
}
ODD = {"a.weight": (12, 4, 3), "a.bias": (12,), "b.weight": (5, 12, 4), "c.weight": (24, 12), "c.bias": (24,)}
ODD_SYMMETRY = Symmetry(
    {
        "a.weight": ("p", None, "s"),  # another axis than the inputs
        "a.bias": ("q",),  # biases that do not go with their rows
        "b.weight": (None, ("r", 4, "r"), "t"),  # segments, fixed entries, two axes at once
        "c.weight": (("p", "p"), "p"),
        "c.bias": (("p", "p"),),
    },
    {"p": 12, "q": 12, "r": 4, "s": 3, "t": 4},
)


def network(shapes, token_size, layout):
    table = build_layer_table({key: torch.zeros(s) for key, s in shapes.items()}, token_size=token_size, layout=layout)
    values = np.arange(table.num_tokens * token_size, dtype=np.float32).reshape(-1, token_size)
    return table, values


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("token_size", [7, 16, 250])
@pytest.mark.parametrize("shapes", [CHAIN, ODD])
def test_every_window_is_what_the_gather_indices_say(shapes, token_size, layout):
    table, values = network(shapes, token_size, layout)
    symmetry = derive_symmetry(table) if shapes is CHAIN else ODD_SYMMETRY
    assert not symmetry.is_trivial
    mover = Mover(table, symmetry)
    permutations = random_permutations(symmetry, np.random.default_rng(3))
    expected = values.reshape(-1)[gather_indices(table, symmetry, permutations)].reshape(values.shape)
    assert not np.array_equal(expected, values)
    for window in {1, 3, table.num_tokens}:
        for start in range(table.num_tokens - window + 1):
            out = np.empty((window, token_size), values.dtype)
            mover.cut(values, permutations, start, out)
            assert np.array_equal(out, expected[start : start + window])


@pytest.mark.parametrize("copies", [1, 1000])  # the second is too large to be permuted at once
def test_windows_of_a_network_are_of_one_draw(copies):
    shapes = {"a.0.weight": (8 * copies, 40), "a.0.bias": (8 * copies,), "a.2.weight": (10, 8 * copies)}
    table, values = network(shapes, 41, "sparse")
    symmetry = derive_symmetry(table)
    permutations = random_permutations(symmetry, np.random.default_rng((1, 2)))
    expected = values.reshape(-1)[gather_indices(table, symmetry, permutations)].reshape(values.shape)
    permuted = Permuted(values, Mover(table, symmetry), np.random.default_rng((1, 2)))
    for start in (0, 3, table.num_tokens - 5):
        out = np.empty((5, 41), values.dtype)
        permuted.cut(start, out)
        assert np.array_equal(out, expected[start : start + 5])
