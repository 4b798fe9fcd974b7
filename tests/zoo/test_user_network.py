"""Networks of the user's: found by name, called as they want, refused with a sentence."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.zoo.user_network import UserNetwork, check_same

sys.path.insert(0, str(Path(__file__).parent))


@pytest.mark.parametrize("name", ["plain", "ten", "keywords"])
def test_a_function_is_called_with_classes_if_it_takes_them(name):
    assert UserNetwork(f"user_networks:{name}", 10).shapes["3.weight"] == (10, 144)
    assert UserNetwork(f"user_networks:{name}", 7).shapes["3.weight"][0] == (10 if name == "ten" else 7)


def test_a_class_builds_too_and_buffers_belong_to_it():
    shapes = UserNetwork("user_networks:Residual", 3).shapes
    assert shapes["head.weight"] == (3, 128) and shapes["norm.num_batches_tracked"] == ()


def test_a_seed_decides_the_weights_and_the_random_state_stays():
    network = UserNetwork("user_networks:plain", 10)
    torch.manual_seed(3)
    first, second, other = network.state_dict(1), network.state_dict(1), network.state_dict(2)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(first[key], second[key]) and not torch.equal(first[key], other[key]) for key in first)


def test_it_travels_as_its_name_and_its_file_has_a_digest():
    network = UserNetwork("user_networks:plain", 10)
    assert pickle.loads(pickle.dumps(network)) == network and len(pickle.dumps(network)) < 200
    assert len(network.source) == 8 and network.source == UserNetwork("user_networks:Residual", 10).source
    assert UserNetwork("math:floor", 1).source == "", "it has no source"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user_networks", "give package.module:function"),
        (":plain", "give package.module:function"),
        ("user_networks:a b", "give package.module:function"),
        (
            "no_such_module_at_all:net",
            "cannot be imported .*No module named.*put the folder that it is in on PYTHONPATH",
        ),
        ("user_networks:resnet50", "user_networks has no 'resnet50'"),
        ("user_networks:FIVE", "has 'FIVE', a int: name a function"),
        ("user_networks:nothing", "returns a dict: it must return the network"),
        ("user_networks:demanding", "raised TypeError: .*'depth'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(path, message):
    with pytest.raises(InputError, match=message):
        UserNetwork(path, 10).build()


def test_a_module_that_raises_on_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_networks.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="ZeroDivisionError"):
        UserNetwork("broken_networks:net", 10).build()


def test_the_first_key_that_differs_is_named_with_both_shapes():
    found = UserNetwork("user_networks:residual", 10).shapes
    check_same(found, found, "a:b", "the samples")
    with pytest.raises(InputError, match=r"stem.weight is \[12, 1, 3, 3\] in the network and \[8, 1, 3, 3\] in the sa"):
        check_same(UserNetwork("user_networks:wider", 10).shapes, found, "a:b", "the samples")
    less = {key: shape for key, shape in found.items() if key != "head.bias"}
    with pytest.raises(InputError, match=r"head.bias is missing in the network and \[10\] in the samples"):
        check_same(less, found, "a:b", "the samples")


def test_images_must_go_through_and_answers_be_logits():
    UserNetwork("user_networks:plain", 10).check_answers(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"does not take images of shape \[2, 3, 8, 8\]"):
        UserNetwork("user_networks:plain", 10).check_answers(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"with \[2, 10\]: it must answer with logits of shape \[2, 7\]"):
        UserNetwork("user_networks:ten", 7).check_answers(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"\[2, 4, 6, 6\]"):
        UserNetwork("user_networks:answering_maps", 4).check_answers(torch.zeros(2, 1, 8, 8))
