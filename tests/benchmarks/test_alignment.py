import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import alignment

from sane_ray.tokens.symmetry import derive_symmetry, permute
from sane_ray.tokens.tokenizer import build_layer_table

STAND_IN = '''
from types import SimpleNamespace
import alignment, torch
from sane_ray.tokens.symmetry import derive_symmetry
from sane_ray.tokens.tokenizer import build_layer_table

def spec_of(weights):
    axes = derive_symmetry(build_layer_table(weights)).axes
    return SimpleNamespace(
        axes_to_perm={key: tuple(name and f"P_{name}" for name in names) for key, names in axes.items()}
    )

def resnet18_permutation_spec():
    return spec_of(alignment.resnet18(0, width=4))

def zoo_cnn_permutation_spec():
    return spec_of(alignment.cnn(0))

def weight_matching(spec, one, other):
    """Reverses all channels."""
    sizes = {
        name: one[key].shape[0] for key, names in spec.axes_to_perm.items() for name in names[:1] if name is not None
    }
    return {name: torch.arange(size).flip(0).float() for name, size in sizes.items()}
'''


def symmetry_of(weights):
    return derive_symmetry(build_layer_table(weights))


@pytest.fixture
def published(tmp_path):
    path = tmp_path / alignment.MATCHING
    path.parent.mkdir(parents=True)
    path.write_text(STAND_IN)
    return tmp_path


def test_networks_are_those_that_are_named():
    weights = alignment.resnet18(0)
    assert sum(value.numel() for key, value in weights.items() if "running" not in key and value.dim()) == 11_173_962
    assert len(symmetry_of(weights).sizes) == 12
    assert sum(value.numel() for value in alignment.cnn(0).values()) == 2_464
    assert not torch.equal(alignment.cnn(0)["module_list.0.weight"], alignment.cnn(1)["module_list.0.weight"])


def test_a_planted_network_is_the_reference_permuted():
    weights = alignment.resnet18(0, width=4)
    symmetry = symmetry_of(weights)
    other = alignment.planted(weights, noise=0)
    pair = alignment.Pair("", "", weights, [other])
    found = alignment.align(pair, symmetry, seed=0)[0]
    aligned = permute(other, symmetry, found)
    assert all(torch.equal(aligned[key], weights[key]) for key in weights)
    assert alignment.cosine(weights, other, symmetry) < 0.9
    assert alignment.cosine(weights, aligned, symmetry) == pytest.approx(1)


def test_published_permutations_get_our_names(published):
    weights = alignment.resnet18(0, width=4)
    symmetry = symmetry_of(weights)
    code = alignment.load_published(published)
    pair = alignment.Pair("", "resnet18_permutation_spec", weights, [weights])
    found = alignment.align_published(pair, symmetry, code, seed=0)[0]
    assert found.keys() == symmetry.sizes.keys()
    for name, size in symmetry.sizes.items():
        np.testing.assert_array_equal(found[name], np.arange(size)[::-1])


def test_prints_both_sides_or_ours_alone(capsys, published):
    alignment.main(["--published", str(published), "--repetitions", "1", "--width", "4"])
    lines = capsys.readouterr().out.splitlines()
    for line in lines[1:4]:
        *_, ours, ours_similarity, theirs, their_similarity, ratio = line.replace(",", "").split()
        assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.2, abs=0.06)
        assert float(ours_similarity) > float(their_similarity)
    alignment.main(["--published", "nowhere", "--repetitions", "1", "--width", "4"])
    printed = capsys.readouterr().out
    assert "no published code at nowhere" in printed
    assert len(printed.splitlines()[1].split()) == 4


def test_a_pair_of_checkpoints_can_be_given(tmp_path):
    paths = [tmp_path / f"{seed}.pt" for seed in range(2)]
    for seed, path in enumerate(paths):
        torch.save(alignment.resnet18(seed, width=4), path)
    options = alignment.parse(["--pair", *map(str, paths)])
    assert [pair.name for pair in alignment.pairs(options)] == ["resnet18 given"]


def test_medians_are_of_runs():
    runs = [alignment.Run(seconds, 0.5) for seconds in (1, 9, 2)]
    assert alignment.median(runs) == 2
    assert alignment.mean_similarity(runs) == 0.5
