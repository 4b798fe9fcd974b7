"""Novelty: against values by hand and by plain loops."""

import numpy as np
import pytest
import torch

from sane_ray.sampling.novelty import other_runs, weight_distances, wrong_agreement


def test_distances_are_root_mean_squares():
    one, two = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert weight_distances(one, two) == pytest.approx(np.array([[0, 1], [12.5**0.5, 6.5**0.5]]))


def test_distances_of_near_networks_are_not_lost_in_rounding():
    base = 100 * torch.ones(1, 1000)
    assert weight_distances(base, base + 1e-3)[0, 0] == pytest.approx(1e-3, rel=1e-2)
    assert weight_distances(base, base)[0, 0] == 0


def by_hand(first, second, labels):
    same = sum(a == b != label for a, b, label in zip(first, second, labels, strict=True))
    either = sum(a != label or b != label for a, b, label in zip(first, second, labels, strict=True))
    return same / either if either else 0.0


def test_wrong_answers_alike_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    first, second = rng.integers(4, size=(5, 60)), rng.integers(4, size=(7, 60))
    first[0] = labels
    second[0] = labels
    second[1] = first[1]
    found = wrong_agreement(first, second, labels)
    expected = [[by_hand(a, b, labels) for b in second] for a in first]
    assert found == pytest.approx(np.array(expected))
    assert found[0, 0] == 0
    assert found[1, 1] == 1


def test_checkpoints_of_one_run_do_not_count_as_others():
    values = np.arange(9.0).reshape(3, 3)
    found = other_runs(values, ["a", "b", "a"], np.inf)
    assert np.isinf(found[[0, 0, 1, 2, 2], [0, 2, 1, 0, 2]]).all()
    assert found[0, 1] == 1
    assert found[1].tolist() == [3, np.inf, 5]
