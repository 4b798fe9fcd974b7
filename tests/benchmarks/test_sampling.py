"""The sampling benchmark measures sides that do the same, and says so."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sampling
from published_step import is_checkout

from sane_ray.zoo.images import load_images

CHECKOUT = sampling.ROOT.parent / "SANE"


@pytest.fixture(scope="module")
def sides():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    setting, images = sampling.Setting.made(), load_images("digits", seed=0)
    ours = sampling.Ours(setting, images, 1)
    yield ours, sampling.Plain(setting, images)
    torch.set_num_threads(threads)


def test_both_sides_draw_and_decode_the_same_networks(sides):
    ours, plain = (side.sample(3) for side in sides)
    assert list(ours) == list(plain)
    for key, values in ours.items():
        assert values.shape == (3, *sampling.Setting.made().anchors[0][key].shape)
        np.testing.assert_allclose(values, plain[key], atol=2e-2)  # bfloat16 where the processor has it


def test_both_sides_measure_the_same_accuracies(sides):
    weights = {key: values[:3] for key, values in sampling.Setting.made().stacked.items()}
    ours, plain = (side.evaluate(weights, 0) for side in sides)
    assert ours.shape == (3, 3)
    assert len(np.unique(ours)) > 3
    np.testing.assert_allclose(ours, plain, atol=sampling.AGREEMENT)


def test_actors_find_the_same_and_count_their_time():
    setting, images = sampling.Setting.made(), load_images("digits", seed=0)
    weights = {key: values[:4] for key, values in setting.stacked.items()}
    several, one = sampling.Ours(setting, images, 2), sampling.Ours(setting, images, 1)
    try:
        np.testing.assert_array_equal(several.evaluate(weights, 1), one.evaluate(weights, 1))
        assert several.elsewhere > 0
    finally:
        several.close()


def test_training_is_measured_and_changes_nothing_before_it(sides):
    weights = {key: values[:2] for key, values in sampling.Setting.made().stacked.items()}
    for side in sides:
        np.testing.assert_array_equal(side.evaluate(weights, 1), side.evaluate(weights, 0))


def test_stacks_are_as_many_for_each_actor():
    weights = {"weight": np.zeros((100, 2))}
    for actors, sizes in ((1, [25] * 4), (2, [25] * 4), (3, [17, 17, 17, 17, 16, 16])):
        assert [len(piece.params) for piece in sampling.pieces_of(weights, actors)] == sizes
    assert len(sampling.pieces_of({"weight": np.zeros((1, 2))}, 4)) == 1


def test_the_best_of_each_part_counts():
    cost = sampling.best([sampling.Cost(1, 5, 9), sampling.Cost(2, 3, 12)])
    assert (cost.sampling, cost.fine_tuning, cost.whole) == (1, 6, 10)


def test_it_prints_each_part_and_the_ratio(capsys, tmp_path):
    sampling.main(["--networks", "2", "--rounds", "1", "--threads", "1", "--published", str(tmp_path)])
    printed = capsys.readouterr().out
    for part in ("sampling", "zero-shot", "fine-tuning", "whole", "floor", "seconds of the processor"):
        assert part in printed
    assert "plain loop of ours (no published code" in printed


@pytest.mark.skipif(not is_checkout(CHECKOUT), reason="needs a checkout of the published code beside this one")
def test_the_published_loop_measures_the_same(capsys):
    sampling.main(["--networks", "2", "--rounds", "1", "--threads", "1", "--published", str(CHECKOUT)])
    assert "differ by 0.0000" in capsys.readouterr().out
