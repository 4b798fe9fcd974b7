"""The embedding benchmark measures sides that compute the same, and says so."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import embedding


@pytest.mark.parametrize("side", [name for name in embedding.OURS if name != "ours-windows"])
def test_our_sides_give_the_mean_embedding_of_whole_networks(side):
    work = embedding.Work(side, "digits", 3, "cpu", 1)
    model, tokens, positions = embedding.workload(work)
    with torch.no_grad():
        expected = model.encode(tokens, positions.expand(3, -1, -1)).mean(dim=1)
    found = embedding.ours(work, model, tokens)()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if side != "ours-float32" else 1e-6)


def test_the_best_round_counts():
    costs = {"ours": [embedding.Cost(2.0, 1.0), embedding.Cost(1.0, 3.0)], "published": [embedding.Cost(6.0, 4.0)]}
    assert embedding.ratio(costs, "published", "seconds") == 6.0
    assert embedding.ratio(costs, "published", "processor") == 4.0
