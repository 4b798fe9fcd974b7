import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
import symmetry_networks as nets

from sane_ray.errors import InputError
from sane_ray.tokens.symmetry import (
    Symmetry,
    derive_symmetry,
    gather_indices,
    permute,
    random_permutations,
)
from sane_ray.tokens.tokenizer import build_layer_table, tokenize
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.checkpoint import load_state_dict

ZOO_CNN = {"model::type": "CNN"}


def module_list(*modules):
    """The modules as the published zoos number them."""
    network = nn.Sequential()
    network.add_module("module_list", nn.Sequential(*modules))
    return network


def cnn():
    """Convolutions, tanh, pooling, a flatten and two linear layers, numbered as in the published zoos."""
    maps = (nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(6, 5, 3, bias=False), nn.Tanh(), nn.Flatten())
    features = (nn.Linear(5 * 3 * 3, 9), nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, 4))
    return module_list(*maps, *features), torch.randn(3, 1, 12, 12)


def cnn_batch_norm():
    """Batch norms on maps, on flattened maps (longer than the convolution is wide), and without affine parameters."""
    first = (nn.BatchNorm2d(2), nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    second = (nn.Conv2d(6, 5, 3), nn.PReLU(), nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.BatchNorm1d(45))
    third = (nn.Linear(45, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 4), nn.BatchNorm1d(4))
    return module_list(*first, *second, *third), torch.randn(8, 2, 7, 7)


def cnn_group_norm():
    """A group norm and a PReLU hold the channels that they read in place; the rest may move."""
    maps = (nn.Conv2d(1, 6, 3), nn.GroupNorm(3, 6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten())
    features = (nn.Linear(36, 8), nn.PReLU(8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    return module_list(*maps, *features), torch.randn(3, 1, 7, 7)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, shortcut, depth):
        super().__init__()
        widths = [inputs, *[outputs // (depth - 1)] * (depth - 1), outputs]
        for place in range(1, depth + 1):
            step = stride if place == 1 else 1
            conv = nn.Conv2d(widths[place - 1], widths[place], 3, step, padding=1, bias=False)
            setattr(self, f"conv{place}", conv)
            setattr(self, f"bn{place}", nn.BatchNorm2d(widths[place]))
        self.depth, self.shortcut_name = depth, shortcut
        if stride != 1 or inputs != outputs:
            self.add_module(
                shortcut, nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )

    def forward(self, x):
        y = x
        for place in range(1, self.depth + 1):
            y = getattr(self, f"bn{place}")(getattr(self, f"conv{place}")(y))
            y = functional.relu(y) if place < self.depth else y
        shortcut = getattr(self, self.shortcut_name, nn.Identity())
        return functional.relu(y + shortcut(x))


class ResNet(nn.Module):
    def __init__(self, shortcut="downsample", head="fc", depth=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1, shortcut, depth), Block(4, 4, 1, shortcut, depth))
        self.layer2 = nn.Sequential(Block(4, 8, 2, shortcut, depth), Block(8, 8, 1, shortcut, depth))
        self.add_module(head, nn.Linear(8, 5))
        self.head = head

    def forward(self, x):
        x = self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))
        return getattr(self, self.head)(x.mean(dim=(2, 3)))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.model = inner

    def forward(self, x):
        return self.model(x)


NETWORKS = {
    "cnn": cnn,
    "cnn_batch_norm": cnn_batch_norm,
    "cnn_group_norm": cnn_group_norm,
    "resnet": lambda: (ResNet(), torch.randn(4, 3, 8, 8)),
    "resnet_shortcut": lambda: (Wrapped(ResNet("shortcut", "linear")), torch.randn(4, 3, 8, 8)),
    "resnet_bottleneck": lambda: (ResNet(depth=3), torch.randn(4, 3, 8, 8)),
}
PERMUTATIONS = {
    "cnn": 3, "cnn_batch_norm": 3, "cnn_group_norm": 2, "resnet": 6, "resnet_shortcut": 6, "resnet_bottleneck": 10
}  # fmt: skip


def trained(name):
    """The network in eval mode, its batch norms random and after training passes, so that no two channels are alike."""
    torch.manual_seed(0)
    network, images = NETWORKS[name]()
    with torch.no_grad():
        for module in network.modules():
            if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
                module.weight.uniform_(0.5, 2)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
        for _ in range(5):
            network(images + torch.randn_like(images))
    return network.double().eval(), images.double()


def outputs(network, images, state_dict):
    network = copy.deepcopy(network)
    network.load_state_dict(state_dict)
    with torch.no_grad():
        return network(images)


def generator():
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_norm", ["keep", "ignore"])
def test_permuted_weights_differ_and_compute_the_same_function(name, batch_norm):
    network, images = trained(name)
    state_dict = network.state_dict()
    symmetry = derive_symmetry(build_layer_table(state_dict, batch_norm=batch_norm), ZOO_CNN)
    assert len(symmetry.sizes) == PERMUTATIONS[name] and not symmetry.is_trivial
    expected = network(images)
    permuted = permute(state_dict, symmetry, random_permutations(symmetry, generator()))
    assert list(permuted) == list(state_dict)
    assert (outputs(network, images, permuted) - expected).abs().max() < 1e-10
    for key in symmetry.axes:
        assert permuted[key].shape == state_dict[key].shape
        assert torch.equal(permuted[key].flatten().sort()[0], state_dict[key].flatten().sort()[0])
        if state_dict[key].dim() > 1:
            assert not torch.equal(permuted[key], state_dict[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_each_permutation_alone_keeps_the_function_and_each_axis_left_out_breaks_it(name):
    network, images = trained(name)
    state_dict = network.state_dict()
    symmetry = derive_symmetry(build_layer_table(state_dict), ZOO_CNN)
    expected = network(images)
    identity = {permutation: np.arange(size) for permutation, size in symmetry.sizes.items()}
    for permutation, size in symmetry.sizes.items():
        one = {**identity, permutation: np.roll(np.arange(size), 1)}
        permuted = permute(state_dict, symmetry, one)
        assert (outputs(network, images, permuted) - expected).abs().max() < 1e-10
        for key, names in symmetry.axes.items():
            if permutation in names:
                incomplete = {**permuted, key: state_dict[key]}
                assert (outputs(network, images, incomplete) - expected).abs().max() > 1e-6, (permutation, key)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_norm", ["keep", "ignore"])
@pytest.mark.parametrize("token_size", [0, 5, 8, 64])
def test_gathering_tokens_equals_tokenizing_the_permuted_network(name, batch_norm, token_size):
    state_dict = trained(name)[0].state_dict()
    table = build_layer_table(state_dict, token_size=token_size, batch_norm=batch_norm)
    symmetry = derive_symmetry(table, ZOO_CNN)
    permutations = random_permutations(symmetry, generator())
    tokens = tokenize(state_dict, table)
    expected = tokenize(permute(state_dict, symmetry, permutations), table)
    indices = gather_indices(table, symmetry, permutations)
    assert indices.dtype == np.int64 and indices.shape == (tokens.numel(),)
    assert not torch.equal(tokens, expected)
    assert torch.equal(tokens.reshape(-1)[torch.from_numpy(indices)].reshape(tokens.shape), expected)
    assert np.array_equal(np.sort(indices), np.arange(tokens.numel()))


@pytest.mark.parametrize("window", [1, 3, 16])
def test_a_window_of_indices_is_a_slice_of_all(window):
    table = build_layer_table(trained("resnet")[0].state_dict(), token_size=5)
    symmetry = derive_symmetry(table)
    permutations = random_permutations(symmetry, generator())
    every = gather_indices(table, symmetry, permutations).reshape(table.num_tokens, 5)
    for start in range(table.num_tokens - window + 1):
        found = gather_indices(table, symmetry, permutations, start, start + window)
        assert np.array_equal(found.reshape(window, 5), every[start : start + window])
    assert gather_indices(table, symmetry, permutations, table.num_tokens).size == 0


def test_the_identity_gathers_every_value_from_its_place(parity):
    state_dict = load_state_dict(parity / "cnn_a.safetensors")
    table = build_layer_table(state_dict, token_size=32)
    symmetry = derive_symmetry(table)
    assert symmetry.sizes == {f"module_list.{index}": size for index, size in ((0, 8), (3, 6), (6, 4), (9, 20))}
    identity = {name: np.arange(size) for name, size in symmetry.sizes.items()}
    assert np.array_equal(gather_indices(table, symmetry, identity), np.arange(table.num_tokens * 32))
    trivial = Symmetry({}, {})
    assert np.array_equal(gather_indices(table, trivial, {}), np.arange(table.num_tokens * 32))


def test_a_flatten_moves_blocks_and_leaves_the_order_within_them():
    first, last = "module_list.0.weight", "module_list.2.weight"
    state_dict = {first: torch.randn(2, 1, 3, 3), last: torch.arange(6.0).reshape(1, 6)}
    symmetry = derive_symmetry(build_layer_table(state_dict), ZOO_CNN)
    permuted = permute(state_dict, symmetry, {"module_list.0": np.array([1, 0])})
    assert permuted[last].tolist() == [[3, 4, 5, 0, 1, 2]]
    assert torch.equal(permuted[first], state_dict[first].flip(0))


def test_residual_streams_share_a_permutation_until_a_shortcut_with_weights():
    axes = derive_symmetry(build_layer_table(ResNet().state_dict())).axes
    assert axes["layer1.0.conv2.weight"][0] == axes["layer1.1.conv2.weight"][0] == axes["conv1.weight"][0] == "conv1"
    assert axes["layer2.0.conv1.weight"][1] == axes["layer2.0.downsample.0.weight"][1] == "conv1"
    stream = axes["layer2.0.downsample.0.weight"][0]
    assert stream == axes["layer2.0.conv2.weight"][0] == axes["layer2.1.bn2.running_var"][0] == axes["fc.weight"][1]
    assert stream != "conv1" and "fc.bias" not in axes


def test_untokenized_entries_move_and_unnamed_ones_pass_through():
    state_dict = trained("cnn_batch_norm")[0].state_dict()
    symmetry = derive_symmetry(build_layer_table(state_dict, batch_norm="ignore"), ZOO_CNN)
    permutation = random_permutations(symmetry, generator())
    weight, variance, counter = (
        f"module_list.{key}" for key in ("1.weight", "2.running_var", "2.num_batches_tracked")
    )  # fmt: skip
    permuted = permute({**state_dict, "other": state_dict[weight]}, symmetry, permutation)
    assert torch.equal(permuted[variance], state_dict[variance][permutation["module_list.1"]])
    assert permuted[counter] is state_dict[counter]
    assert permuted["other"] is state_dict[weight]


class PreActivation(nn.Module):
    """As many tensors as a residual block, but another function."""

    def __init__(self):
        super().__init__()
        self.conv1, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.layer1 = nn.Sequential(Block(4, 4, 1, "shortcut", 2))


def padded_shortcut():
    state_dict = ResNet().state_dict()
    return {key: value for key, value in state_dict.items() if "downsample" not in key}


@pytest.mark.parametrize(
    "state_dict",
    [
        nn.Transformer(8, 2, 1, 1, 8).state_dict(),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)).state_dict(),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(8, 2)).state_dict(),
        nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 2))).state_dict(),
        nn.Sequential(nn.Linear(3, 2)).state_dict(),
        nn.Linear(3, 2).state_dict(),
        {**nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict(), "token": torch.zeros(4)},
        PreActivation().state_dict(),
        padded_shortcut(),
        {**ResNet().state_dict(), "layer1.0.gate.weight": torch.zeros(4, 4)},
    ],
    ids=[
        "transformer", "grouped", "broken_chain", "nested", "one_layer", "linear", "extra", "pre_activation",
        "padded_shortcut", "extra_module",
    ],
)  # fmt: skip
def test_unknown_networks_get_the_trivial_symmetry(state_dict):
    table = build_layer_table(state_dict)
    symmetry = derive_symmetry(table)
    assert symmetry.is_trivial and symmetry.axes == {}
    permuted = permute(state_dict, symmetry, random_permutations(symmetry, generator()))
    assert all(permuted[key] is value for key, value in state_dict.items())


def test_permutations_follow_the_seed_and_a_symmetry_survives_json():
    symmetry = derive_symmetry(build_layer_table(ResNet().state_dict()))
    again = Symmetry.from_dict(json.loads(json.dumps(symmetry.to_dict(), sort_keys=True)))
    assert again == symmetry
    first, second = (random_permutations(each, generator()) for each in (symmetry, again))
    assert first.keys() == symmetry.sizes.keys()
    for name, size in symmetry.sizes.items():
        assert np.array_equal(first[name], second[name])
        assert np.array_equal(np.sort(first[name]), np.arange(size))


def test_permutations_that_do_not_fit_are_refused():
    state_dict = {"0.weight": torch.randn(4, 2), "0.bias": torch.randn(4), "1.weight": torch.randn(3, 4)}
    table = build_layer_table(state_dict)
    symmetry = derive_symmetry(table)
    for permutations, message in (({}, "0 is missing"), ({"0": np.arange(2)}, "has 2 entries")):
        with pytest.raises(InputError, match=message):
            permute(state_dict, symmetry, permutations)
        with pytest.raises(InputError, match=message):
            gather_indices(table, symmetry, permutations)
    good = {"0": np.arange(4)}
    with pytest.raises(InputError, match=r"axis 0 of 0.weight has 5 entries, .* 0 of 4 need a multiple of 4"):
        permute({"0.weight": torch.zeros(5, 2)}, symmetry, good)
    with pytest.raises(InputError, match=r"1 axes of 0.weight, which has 2"):
        gather_indices(table, Symmetry({"0.weight": ("0",)}, {"0": 4}), good)
    with pytest.raises(InputError, match="tokens 3 to 9"):
        gather_indices(table, symmetry, good, 3, 9)


def test_a_bias_may_move_unlike_its_weights_rows():
    """The bias of a square transposed convolution belongs to the second axis, but stands in the rows' last column."""
    state_dict = {"weight": torch.arange(9.0).reshape(3, 3), "bias": torch.arange(3.0) + 9}
    table = build_layer_table(state_dict, token_size=2)
    symmetry = Symmetry({"weight": ("in", "out"), "bias": ("out",)}, {"in": 3, "out": 3})
    permutations = {"in": np.array([1, 2, 0]), "out": np.array([2, 1, 0])}
    assert_gathers(state_dict, table, symmetry, permutations)


def assert_gathers(state_dict, table, symmetry, permutations):
    tokens = tokenize(state_dict, table)
    indices = torch.from_numpy(gather_indices(table, symmetry, permutations))
    expected = tokenize(permute(state_dict, symmetry, permutations), table)
    assert not torch.equal(tokens, expected)
    assert torch.equal(tokens.reshape(-1)[indices].reshape(tokens.shape), expected)


def test_segments_move_apart_in_blocks_of_one_size():
    """Rows of [a, a, fixed, b] in blocks of two: a packed projection with a part that must stay."""
    state_dict = {"weight": torch.arange(64.0).reshape(16, 4), "bias": torch.arange(16.0)}
    symmetry = Symmetry({"weight": (("a", "a", 1, "b"), None), "bias": (("a", "a", 1, "b"),)}, {"a": 2, "b": 3})
    permutations = {"a": np.array([1, 0]), "b": np.array([2, 0, 1])}
    permuted = permute(state_dict, symmetry, permutations)
    assert permuted["bias"].tolist() == [2, 3, 0, 1, 6, 7, 4, 5, 8, 9, 14, 15, 10, 11, 12, 13]
    assert torch.equal(permuted["weight"][:, 0], permuted["bias"] * 4)
    assert_gathers(state_dict, build_layer_table(state_dict, token_size=3), symmetry, permutations)


def test_a_symmetry_survives_a_file(tmp_path):
    symmetry = Symmetry({"wéight": (("a", 2, "a"), None, "b"), "bias": (None,)}, {"a": 2, "b": 3})
    symmetry.save(tmp_path / "symmetry.json")
    assert Symmetry.load(tmp_path / "symmetry.json") == symmetry


def test_the_origin_is_kept_and_tells_no_symmetries_apart(tmp_path):
    symmetry = Symmetry({"weight": ("a",)}, {"a": 2}, origin="traced and proved")
    assert symmetry == Symmetry({"weight": ("a",)}, {"a": 2})
    symmetry.save(tmp_path / "symmetry.json")
    assert Symmetry.load(tmp_path / "symmetry.json").origin == "traced and proved"
    older = {key: value for key, value in symmetry.to_dict().items() if key != "origin"}
    assert Symmetry.from_dict(older).origin == "" and Symmetry.from_dict(older) == symmetry


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as a symmetry"),
        ("[1]", "must have 'axes'"),
        ('{"axes": {}}', "must have 'axes'"),
        ('{"axes": {"w": 3}, "sizes": {}}', "must have 'axes'"),
        ('{"axes": {"w": ["a"]}, "sizes": {}}', "w names 'a'"),
        ('{"axes": {"w": [[0]]}, "sizes": {}}', "w names 0"),
        ('{"axes": {"w": [[["a"]]]}, "sizes": {"a": 2}}', "w names"),
        ('{"axes": {}, "sizes": {"a": 0}}', "permutation a the size 0"),
        ('{"axes": {}, "sizes": {}, "origin": 3}', "must have 'axes'"),
        ('{"axes": {}, "sizes": {"a": 1.5}}', "permutation a the size 1.5"),
    ],
)
def test_a_file_that_holds_no_symmetry_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Symmetry.load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="cannot be read as a symmetry"):
        Symmetry.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"2.weight": (None, "a")}, "2.weight, which the architecture lacks"),
        ({"0.weight": ("a",)}, "1 axes of 0.weight, which has 2"),
        (
            {"0.weight": (("a", "a"), None)},
            r"axis 0 of 0.weight has 4 entries, .* a of 3 \+ a of 3 need a multiple of 6",
        ),
        ({"0.bias": ("a",)}, "axis 0 of 0.bias has 4 entries"),
    ],
)
def test_a_symmetry_of_another_architecture_is_refused(axes, message):
    table = build_layer_table(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)).state_dict())
    Symmetry({"0.weight": ("b", None), "1.weight": (None, "b")}, {"b": 4}).check(table)
    with pytest.raises(InputError, match=message):
        Symmetry(axes, {"a": 3}).check(table)


def zoo_cnn(kind, channels):
    """A network of the published zoos."""
    params = {"model::type": kind, "model::channels_in": channels, "model::o_dim": 10, "model::nlin": "tanh"}
    return from_params({**params, "model::init_type": "kaiming_normal", "model::dropout": 0.0, "seed": 1})


IMAGES, WORDS = torch.randn(4, 3, 16, 16), torch.randint(0, 11, (3, 5))
HINTS = {"num_attention_heads": 3}
KNOWN = {
    "cnn_s": (lambda: zoo_cnn("CNN", 1), torch.randn(3, 1, 28, 28), {}, 4),
    "cnn_l": (lambda: zoo_cnn("CNN3", 3), torch.randn(3, 3, 32, 32), {}, 4),
    "digits_cnn": (lambda: zoo_cnn("digits_cnn", 1), torch.randn(3, 1, 8, 8), {}, 3),
    "digits_cnn_wide": (lambda: zoo_cnn("digits_cnn_wide", 1), torch.randn(3, 1, 8, 8), {}, 3),
    "digits_cnn_deep": (lambda: zoo_cnn("digits_cnn_deep", 1), torch.randn(3, 1, 8, 8), {}, 4),
    "resnet18": (lambda: nets.ResNet(18), IMAGES, {}, 8 + 4),
    "resnet34": (lambda: nets.ResNet(34), IMAGES, {}, 16 + 4),
    "resnet50": (lambda: nets.ResNet(50), IMAGES, {}, 32 + 5),
    "resnet101": (lambda: nets.ResNet(101), IMAGES, {}, 66 + 5),
    "resnet152": (lambda: nets.ResNet(152), IMAGES, {}, 100 + 5),
    "wide_resnet50_2": (lambda: nets.ResNet(50, width_factor=2), IMAGES, {}, 32 + 5),
    "resnext50": (lambda: nets.ResNet(50, groups=2, width_factor=2), IMAGES, {}, 16 + 5),
    "wide_resnet28": (nets.WideResNet, IMAGES, {}, 12 + 4),
    "vgg11": (lambda: nets.VGG(11, False), torch.randn(2, 3, 32, 32), {}, 10),
    "vgg11_bn": (lambda: nets.VGG(11, True), torch.randn(2, 3, 32, 32), {}, 10),
    "vgg16": (lambda: nets.VGG(16, False), torch.randn(2, 3, 32, 32), {}, 15),
    "vgg16_bn": (lambda: nets.VGG(16, True), torch.randn(2, 3, 32, 32), {}, 15),
    "alexnet": (nets.AlexNet, torch.randn(2, 3, 32, 32), {}, 7),
    "mobilenet": (nets.MobileNet, IMAGES, {}, 3),
    "encoder": (nets.Encoder, torch.randn(3, 5, 12), {}, 2),
    "encoder_heads": (nets.Encoder, torch.randn(3, 5, 12), {"nhead": 3, "d_model": 12}, 4),
    "gpt2": (nets.GPT, WORDS, {}, 2),
    "gpt2_heads": (nets.GPT, WORDS, {"n_head": 3, "n_embd": 12, "activation_function": "gelu_new"}, 4),
    "nano_gpt_heads": (lambda: nets.GPT(nn.Linear), WORDS, {"n_head": 3}, 4),
    "nano_gpt_plain": (lambda: nets.GPT(lambda i, o: nn.Linear(i, o, bias=False)), WORDS, {"n_head": 3}, 4),
    "llama": (nets.Llama, WORDS, {}, 2),
    "llama_heads": (nets.Llama, WORDS, {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}, 4),
    "llama_all_heads": (lambda: nets.Llama(shared=6), WORDS, {"num_attention_heads": 6}, 4),
    "bert": (nets.BertLayer, torch.randn(3, 5, 12), {}, 1),
    "bert_heads": (nets.BertLayer, torch.randn(3, 5, 12), {"num_attention_heads": 4, "hidden_size": 12}, 2),
    "vit": (nets.ViT, torch.randn(3, 3, 8, 8), {}, 2),
    "vit_heads": (nets.ViT, torch.randn(3, 3, 8, 8), {"num_heads": 4}, 4),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_keep_their_function(name):
    make, inputs, hints, number = KNOWN[name]
    network, inputs = nets.trained(make, inputs)
    state_dict = network.state_dict()
    symmetry = derive_symmetry(build_layer_table(state_dict), hints)
    symmetry.check(build_layer_table(state_dict))
    assert len(symmetry.sizes) == number
    expected = network(inputs)
    permuted = permute(state_dict, symmetry, random_permutations(symmetry, generator()))
    assert (outputs(network, inputs, permuted) - expected).abs().max() < 1e-5 * expected.abs().max()
    moved = {key for key in state_dict if not torch.equal(permuted[key], state_dict[key])}
    used = {part for axes in symmetry.axes.values() for axis in axes for part in parts_of(axis)}
    assert used == symmetry.sizes.keys() and moved


def parts_of(axis):
    return axis if isinstance(axis, tuple) else (axis,) if axis is not None else ()


@pytest.mark.parametrize("name", ["resnext50", "vgg11_bn", "gpt2_heads", "llama_heads", "encoder_heads"])
def test_no_axis_of_a_known_family_could_be_left_out(name):
    make, inputs, hints, _ = KNOWN[name]
    network, inputs = nets.trained(make, inputs)
    state_dict, expected = network.state_dict(), network(inputs)
    symmetry = derive_symmetry(build_layer_table(state_dict), hints)
    permutation, size = max(symmetry.sizes.items(), key=lambda item: (item[1] > 2, item[0]))
    identity = {each: np.arange(number) for each, number in symmetry.sizes.items()}
    permuted = permute(state_dict, symmetry, {**identity, permutation: np.roll(np.arange(size), 1)})
    for key, axes in symmetry.axes.items():
        if permutation in {part for axis in axes for part in parts_of(axis)}:
            incomplete = {**permuted, key: state_dict[key]}
            change = (outputs(network, inputs, incomplete) - expected).abs().max()
            assert change > 1e-9 * expected.abs().max(), key


@pytest.mark.parametrize("name", ["resnet18", "resnext50", "vgg11_bn", "gpt2_heads", "llama_heads", "mobilenet"])
@pytest.mark.parametrize("layout", ["sparse", "dense", "mixed"])
@pytest.mark.parametrize("token_size", [0, 7])
def test_gathering_equals_permuting_in_every_layout(name, layout, token_size):
    make, inputs, hints, _ = KNOWN[name]
    state_dict = nets.trained(make, inputs)[0].state_dict()
    table = build_layer_table(state_dict, token_size=token_size, layout=layout)
    symmetry = derive_symmetry(table, hints)
    permutations = random_permutations(symmetry, generator())
    assert_gathers(state_dict, table, symmetry, permutations)
    every = gather_indices(table, symmetry, permutations).reshape(table.num_tokens, -1)
    for start in range(0, table.num_tokens - 5, max(table.num_tokens // 50, 1)):
        window = gather_indices(table, symmetry, permutations, start, start + 5).reshape(5, -1)
        assert np.array_equal(window, every[start : start + 5])


def variant(network, **changes):
    """Keys and shapes of a network with some tensors added (a shape) or removed (None)."""
    state_dict = dict(network.state_dict())
    for key, shape in changes.items():
        key = key.replace("__", ".")
        if shape is None:
            del state_dict[key]
        else:
            state_dict[key] = torch.zeros(shape)
    return state_dict


def maps(*modules):
    return nn.Sequential(nn.Conv2d(3, 16, 1), *modules)


def branches():
    """Two layers read the same units, and their product is read by a third."""
    first, second, third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    return nets.Listed([first, second, third], lambda x: third(first(x).relu() * second(x).relu()))


def recurrent():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    return nets.Listed([first, second], lambda x: torch.tanh(first(x) + second(torch.tanh(first(x)))))


def residual(*widths):
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]

    def forward(x):
        for layer in layers:
            y = torch.tanh(layer(x))
            x = x + y if x.shape == y.shape else y
        return x

    return nets.Listed(layers, forward)


def two_layer_residual():
    """A residual stream around pairs of layers whose widths differ."""
    up, down, last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
    return nets.Listed([up, down, last], lambda x: last(x + down(up(x).relu())))


def channels_last():
    first, last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 4)
    modules = [first, nn.ReLU(), nn.Flatten(), last]
    return nets.Listed(modules, lambda x: last(first(x).relu().permute(0, 2, 3, 1).flatten(1)))


PIXELS, FEATURES, PLACES = torch.randn(2, 3, 6, 6), torch.randn(3, 8), torch.randint(0, 8, (3, 5))
UNCERTAIN = {
    "residual_list": (lambda: residual(8, 8, 8, 8), FEATURES),
    "residual_with_a_wider_layer": (lambda: residual(8, 6, 6, 5), FEATURES),
    "residual_pairs": (two_layer_residual, FEATURES),
    "branches": (branches, FEATURES),
    "recurrent_list": (recurrent, FEATURES),
    "pixel_shuffle": (lambda: maps(nn.PixelShuffle(2), nn.Flatten(), nn.Linear(16 * 36, 5)), PIXELS),
    "channel_shuffle": (lambda: maps(nn.ChannelShuffle(4), nn.Conv2d(16, 8, 1)), PIXELS),
    "channel_shuffle_head": (
        lambda: maps(nn.ChannelShuffle(4), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(288, 3)), PIXELS,
    ),
    "group_norm": (lambda: maps(nn.GroupNorm(4, 16, affine=False), nn.Conv2d(16, 8, 1)), PIXELS),
    "local_response_norm": (lambda: maps(nn.ReLU(), nn.LocalResponseNorm(3), nn.Conv2d(16, 8, 1)), PIXELS),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 2, 1)), PIXELS,
    ),
    "transposed_without_bias": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 8, 1, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 3, 1, bias=False)
        ), PIXELS,
    ),
    "channels_last": (channels_last, PIXELS),
    "embedding": (lambda: nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 4)), PLACES),
    "flattened_embedding": (
        lambda: nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3)), PLACES,
    ),
    "pre_activation": (lambda: nets.PreActivationResNet([8, 8]), PIXELS),
    "pre_activation_with_shortcut": (lambda: nets.PreActivationResNet([8, 12]), PIXELS),
    "unflattened": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (16, 1)), nn.ConvTranspose1d(16, 16, 3)), FEATURES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_keys_and_shapes_do_not_make_certain_stays_in_place(name):
    make, inputs = UNCERTAIN[name]
    network, inputs = nets.trained(make, inputs)
    state_dict, expected = network.state_dict(), network(inputs)
    symmetry = derive_symmetry(build_layer_table(state_dict))
    assert symmetry.is_trivial or name == "flattened_embedding"
    for seed in range(3):
        permuted = permute(state_dict, symmetry, random_permutations(symmetry, np.random.default_rng(seed)))
        network.load_state_dict(permuted)
        assert (network(inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


CERTAIN = {
    "gaps": ((nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), {"0": 8, "2": 8}),
    "widths": ((nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 4)), {"0": 7, "1": 6}),
    "norms": ((nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), {"0": 8}),
    "no_bias": ((nn.Linear(8, 8, False), nn.ReLU(), nn.Linear(8, 6, False), nn.ReLU(), nn.Linear(6, 4)), {"2": 6}),
    "head_of_a_cnn": (
        (nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(),
         nn.Linear(6, 4)),
        {"4": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CERTAIN)
def test_units_between_linear_layers_move_where_nothing_else_can_be_beside_them(name):
    modules, sizes = CERTAIN[name]
    network, inputs = nets.trained(lambda: nn.Sequential(*modules), FEATURES)
    state_dict, expected = network.state_dict(), network(inputs)
    symmetry = derive_symmetry(build_layer_table(state_dict))
    assert symmetry.sizes == sizes
    permuted = permute(state_dict, symmetry, random_permutations(symmetry, generator()))
    assert (outputs(network, inputs, permuted) - expected).abs().max() < 1e-10


def test_the_small_cnn_zoo_is_known_by_its_settings():
    layers = [nn.Conv2d(inputs, 4, 3, 2, 1) for inputs in (1, 4, 4)]
    head = nn.Linear(4, 10)

    def forward(x):
        for layer in layers:
            x = layer(x).relu()
        return head(x.mean((2, 3)))

    network, images = nets.trained(lambda: nets.Listed([*layers, head], forward), torch.randn(2, 1, 16, 16))
    state_dict, expected = network.state_dict(), network(images)
    table = build_layer_table(state_dict)
    symmetry = derive_symmetry(table, {"num_layers": 3, "num_units": 4, "dnn_architecture": "cnn"})
    assert symmetry.sizes == {"layers.0": 4, "layers.1": 4, "layers.2": 4}
    network.load_state_dict(permute(state_dict, symmetry, random_permutations(symmetry, generator())))
    assert (network(images) - expected).abs().max() < 1e-10
    for hints in ({}, {"num_layers": 2, "num_units": 4}, {"num_layers": 3, "num_units": 5}, ZOO_CNN):
        assert derive_symmetry(table, hints).is_trivial


@pytest.mark.parametrize(
    "make, origin",
    [
        (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), "chain"),
        (lambda: nets.VGG(11, False), "VGG"),
        (ResNet, "ResNet"),
        (lambda: nets.WideResNet(1), "wide ResNet"),
        (nets.MobileNet, "inner units of blocks"),
    ],
)
def test_the_origin_names_the_family(make, origin):
    table = build_layer_table(make().state_dict())
    assert derive_symmetry(table).origin == f"names and shapes: {origin}"
    assert derive_symmetry(build_layer_table(nn.Linear(3, 2).state_dict())).origin == ""


def test_networks_with_the_keys_of_vgg_but_another_layout_stay_as_they_are():
    plain, normed = nets.VGG(11, False).state_dict(), nets.VGG(11, True).state_dict()
    shifted = {key.replace("features.18.", "features.19."): value for key, value in plain.items()}
    no_norms = {key: value for key, value in normed.items() if value.dim() in (2, 4) or key.endswith("bias")}
    wide_kernels = {**plain, "features.0.weight": torch.zeros(4, 3, 5, 5)}
    heads = {key.replace("classifier.3.", "classifier.2."): value for key, value in plain.items()}
    for state_dict in (shifted, no_norms, wide_kernels, heads):
        assert derive_symmetry(build_layer_table(state_dict)).is_trivial


def test_a_resnet_without_a_shortcut_or_with_a_flattened_head_stays_as_it_is():
    flattened = {**ResNet().state_dict(), "fc.weight": torch.zeros(5, 32)}
    alike = nn.Module()
    alike.conv1, alike.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    alike.layer1, alike.fc = nn.Sequential(Block(4, 4, 1, "shortcut", 2)), nn.Linear(4, 2)
    strided = {key: value for key, value in ResNet().state_dict().items() if not key.startswith("layer2")}
    strided |= {f"layer2.0.{key}": value for key, value in Block(4, 4, 2, "downsample", 2).state_dict().items()}
    strided["fc.weight"] = torch.zeros(5, 4)  # no width changes: norms may come before convolutions
    for state_dict in (flattened, alike.state_dict(), strided):
        assert derive_symmetry(build_layer_table(state_dict)).is_trivial


@pytest.mark.parametrize(
    "state_dict, hints",
    [
        (variant(nets.BertLayer(), intermediate__norm__weight=(20,)), {}),  # scales the hidden units
        (variant(nets.BertLayer(), intermediate__dense__gate=(20,)), {}),
        (variant(nets.BertLayer(hidden=12)), {}),  # which axis is the hidden one?
        (variant(nets.ViTBlock(), mlp__dwconv__weight=(20, 1, 3, 3)), {}),
        (variant(nets.ViTBlock(), mlp__fc1__lora_B__weight=(20, 4)), {}),
        (variant(nets.ViTBlock(), norm1__weight=None), {}),
        (variant(nn.TransformerEncoderLayer(8, 2, 16), experts__weight=(16, 8)), {}),
        (variant(nets.InvertedResidual(4, 6, 8, 1), conv__4__weight=(8,)), {}),
        (variant(nets.InvertedResidual(4, 6, 8, 1), conv__1__0__weight=(8, 8, 3, 3)), {}),
        (variant(nets.VGG(11, False), features__7__weight=(5,)), {}),
        (variant(nets.VGG(11, False), gate__weight=(4, 4)), {}),
        (variant(nets.ResNet(18), layer1__0__se__weight=(4, 4)), {}),
        (variant(nets.WideResNet(1), block2__layer__0__convShortcut__weight=None), {}),
        (variant(nets.WideResNet(1), block2__layer__0__se__weight=(6,)), {}),
    ],
)
def test_what_looks_like_a_known_network_but_may_not_be_one_stays_as_it_is(state_dict, hints):
    assert derive_symmetry(build_layer_table(state_dict), hints).is_trivial


@pytest.mark.parametrize(
    "state_dict, hints",
    [
        (variant(nets.ViTBlock()), {"num_heads": 5}),
        (variant(nets.ViTBlock()), {"num_heads": 4, "hidden_size": 24}),  # the number is another tower's
        (variant(nets.ViTBlock(), attn__relative_position_bias_table=(9, 4)), {"num_heads": 4}),
        (variant(nets.BertLayer()), {"num_attention_heads": 4, "position_embedding_type": "alibi"}),
        (variant(nets.BertLayer()), {"num_attention_heads": 4, "num_key_value_heads": 2}),
        (variant(nets.BertLayer(), attention__self__slopes=(4,)), {"num_attention_heads": 4}),
        (variant(nets.BertLayer()), {"num_attention_heads": "4"}),
        (variant(nets.LlamaLayer(24, 6, 3)), {"num_attention_heads": 6}),
        (variant(nets.LlamaLayer(24, 6, 3)), {"num_attention_heads": 6, "num_key_value_heads": 4}),
        (variant(nets.LlamaLayer(24, 6, 3), self_attn__sinks=(6,)), HINTS | {"num_key_value_heads": 3}),
        (variant(nets.LlamaLayer(24, 6, 1)), {"num_attention_heads": 6, "num_key_value_heads": 1}),
        (variant(nets.LlamaLayer(24, 6, 3), self_attn__q_norm__weight=(24,)), {"num_attention_heads": 6}),
    ],
)
def test_heads_stay_where_they_are_unless_it_is_certain_what_they_are(state_dict, hints):
    assert len(derive_symmetry(build_layer_table(state_dict), hints).sizes) == 1  # the hidden units of the MLP
