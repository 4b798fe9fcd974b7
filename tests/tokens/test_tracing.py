import copy
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
from sane_ray.tokens.symmetry import derive_symmetry, gather_indices, permute, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table, tokenize
from sane_ray.tokens.tracing import trace_symmetry
from sane_ray.tokens.tracing.space import Space, fixed


def parts_of(axis):
    return axis if isinstance(axis, tuple) else (axis,) if axis is not None else ()


def movable(symmetry):
    """Permutations by the axes they move, whatever their names."""
    places = {name: set() for name in symmetry.sizes}
    for key, axes in symmetry.axes.items():
        for place, axis in enumerate(axes):
            for part in parts_of(axis):
                places[part].add((key, place))
    return {frozenset(found) for found in places.values()}


def outputs(network, inputs, state_dict):
    network = copy.deepcopy(network)
    network.load_state_dict(state_dict)
    with torch.no_grad():
        return network(inputs)


def check_function(network, inputs, symmetry):
    """Every permutation moves something, and all together keep the function."""
    state_dict, expected = network.state_dict(), network(inputs)
    symmetry.check(build_layer_table(state_dict))
    permuted = permute(state_dict, symmetry, random_permutations(symmetry, np.random.default_rng(3)))
    assert (outputs(network, inputs, permuted) - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, size in symmetry.sizes.items():
        identity = {each: np.arange(number) for each, number in symmetry.sizes.items()}
        moved = permute(state_dict, symmetry, {**identity, name: np.roll(np.arange(size), 1)})
        assert any(not torch.equal(moved[key], state_dict[key]) for key in state_dict)


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2)
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.grouped(functional.relu(self.first(x)))))
        x = x.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


class Mixer(nn.Module):
    """Mixes patches and channels in turn, gates, and normalises its weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv1d(3, 8, 2, 2)
        self.patches = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.gate, self.norm = nn.Linear(8, 20), nn.LayerNorm(8)
        self.back = nn.utils.parametrizations.weight_norm(nn.Linear(10, 8))
        self.scale, self.head = nn.Parameter(torch.ones(8)), nn.Linear(48, 3)

    def forward(self, x):
        x = self.embed(x)
        x = (x + self.patches(x)).transpose(1, 2)
        x = x + self.scale * self.back(functional.glu(self.gate(self.norm(x))))
        return self.head(x.flatten(1))


class Einsum(nn.Module):
    """Attention written with einsum, packed by slices of one projection, heads outermost."""

    def __init__(self):
        super().__init__()
        self.project, self.out, self.head = nn.Linear(6, 36), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        packed = self.project(x).unflatten(-1, (3, 12))
        q, k, v = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.head(x + self.out(torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2))).mean(1)


IMAGES, WORDS = torch.randn(4, 3, 16, 16), torch.randint(0, 11, (3, 5))
NETWORKS = {
    "unet": (
        nets.UNet, IMAGES,
        {"down2": 8, "down3": 8, "up2.weight:1": 8, "merge2": 6, "up1.weight:1": 5, "merge1": 7},
    ),
    "densenet": (nets.DenseNet, IMAGES, {"stem": 4, "norms.1": 3, "norms.2": 3, "norms.3": 3}),
    "mobilenet": (nets.MobileNet, IMAGES, 6),
    "recurrent": (
        nets.Recurrent, WORDS,
        {"embedding.weight:1": 6, "lstm.weight_ih_l0": 5, "lstm.weight_ih_l0_reverse": 5, "lstm.weight_ih_l1": 5,
         "lstm.weight_ih_l1_reverse": 5, "gru.weight_ih_l0": 7},
    ),
    "shuffle": (Shuffle, IMAGES, 2),
    "mixer": (Mixer, torch.randn(4, 3, 12), {"scale": 8, "patches.0": 7, "gate": 10}),
    "einsum": (Einsum, torch.randn(4, 5, 6), {"project": 3}),
    "vit": (nets.ViT, torch.randn(3, 3, 8, 8), 5),
    "gpt": (nets.GPT, WORDS, 5),
    "bert": (nets.BertLayer, torch.randn(3, 5, 12), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_symmetries_keep_the_function(name):
    make, inputs, sizes = NETWORKS[name]
    network, inputs = nets.trained(make, inputs)
    before = copy.deepcopy(network.state_dict())
    random_state = torch.get_rng_state()
    symmetry = trace_symmetry(network, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert symmetry.sizes == sizes if isinstance(sizes, dict) else len(symmetry.sizes) == sizes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    check_function(network, inputs, symmetry)


DERIVED = {
    "resnet18": (lambda: nets.ResNet(18), IMAGES, {}),
    "resnet50": (lambda: nets.ResNet(50), IMAGES, {}),
    "resnext50": (lambda: nets.ResNet(50, groups=2, width_factor=2), IMAGES, {}),
    "wide_resnet28": (nets.WideResNet, IMAGES, {}),
    "vgg11_bn": (lambda: nets.VGG(11, True), torch.randn(2, 3, 32, 32), {}),
}
HEADS = {
    "encoder": (nets.Encoder, torch.randn(3, 5, 12), {"nhead": 3}),
    "gpt2": (nets.GPT, WORDS, {"n_head": 3}),
    "nano_gpt": (lambda: nets.GPT(nn.Linear), WORDS, {"n_head": 3}),
    "llama": (nets.Llama, WORDS, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "bert": (nets.BertLayer, torch.randn(3, 5, 12), {"num_attention_heads": 4}),
    "vit": (nets.ViT, torch.randn(3, 3, 8, 8), {"num_heads": 4}),
    "mobilenet": (nets.MobileNet, IMAGES, {}),
}


@pytest.mark.parametrize("name", DERIVED)
def test_tracing_finds_what_is_known_of_a_family_and_no_more(name):
    make, inputs, hints = DERIVED[name]
    network, inputs = nets.trained(make, inputs)
    derived = derive_symmetry(build_layer_table(network.state_dict()), hints)
    traced = trace_symmetry(network, inputs)
    assert movable(traced) == movable(derived)
    assert sorted(traced.sizes.values()) == sorted(derived.sizes.values())


@pytest.mark.parametrize("name", HEADS)
def test_tracing_finds_hidden_units_and_heads_and_the_residual_stream_besides(name):
    make, inputs, hints = HEADS[name]
    network, inputs = nets.trained(make, inputs)
    traced = trace_symmetry(network, inputs)
    assert movable(derive_symmetry(build_layer_table(network.state_dict()), hints)) <= movable(traced)
    check_function(network, inputs, traced)


def test_the_residual_stream_of_a_language_model_moves_with_its_shared_embedding():
    network, words = nets.trained(nets.GPT, WORDS)
    symmetry = trace_symmetry(network, words)
    assert symmetry.axes["wte.weight"] == symmetry.axes["lm_head.weight"] == (None, "wte.weight:1")
    assert symmetry.axes["wpe.weight"] == (None, "wte.weight:1") and symmetry.sizes["wte.weight:1"] == 12
    attention = symmetry.axes["h.0.attn.c_attn.weight"][1]
    assert len(attention) == 3 and len(set(attention)) == 1 and symmetry.sizes[attention[0]] == 3


@pytest.mark.parametrize("name", ["unet", "recurrent", "gpt", "densenet"])
@pytest.mark.parametrize("layout", ["sparse", "dense", "mixed"])
def test_gathering_follows_a_traced_symmetry(name, layout):
    make, inputs, _ = NETWORKS[name]
    network, inputs = nets.trained(make, inputs)
    state_dict = network.state_dict()
    symmetry = trace_symmetry(network, inputs)
    table = build_layer_table(state_dict, token_size=11, layout=layout, parameters="all")
    permutations = random_permutations(symmetry, np.random.default_rng(5))
    tokens, indices = tokenize(state_dict, table), torch.from_numpy(gather_indices(table, symmetry, permutations))
    expected = tokenize(permute(state_dict, symmetry, permutations), table)
    assert torch.equal(tokens.reshape(-1)[indices].reshape(tokens.shape), expected)
    assert not torch.equal(tokens, expected)


class Hidden(nn.Module):
    """A chain whose hidden units something beside its weights tells apart."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.arange(6),
        lambda x: torch.cumsum(x, -1),
        lambda x: x.roll(1, -1).relu(),
        lambda x: x.sort(-1)[0],
        lambda x: x * (x.argmax(-1, keepdim=True) + 1),
        lambda x: torch.fft.rfft(x.relu()).real.repeat(1, 2)[:, :6],
        lambda x: functional.conv1d(x[:, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)[:, 0],
        lambda x: x + torch.cat([x[:, 3:], x[:, :3]], 1).cos() * x[:, :1],
        lambda x: torch.tril(x[:, :, None] * x[:, None]).sum(-1),
        lambda x: x[:, [5, 4, 3, 2, 1, 0]].relu(),
        lambda x: functional.pad(x[:, 1:], (0, 1)) + x,
    ],
    ids=["position", "cumsum", "roll", "sort", "argmax", "fft", "conv", "neighbour", "tril", "index", "shift"],
)
def test_units_that_are_not_alike_stay_in_place(function):
    symmetry = trace_symmetry(Hidden(function), torch.randn(4, 3))
    state_dict = Hidden(function).state_dict()
    assert derive_symmetry(build_layer_table(state_dict)).is_trivial
    assert set(symmetry.sizes.values()) <= {2}  # at most units that are treated alike among themselves
    module = Hidden(function).double()
    if not symmetry.is_trivial:
        check_function(module, torch.randn(4, 3).double(), symmetry)


def test_an_output_or_input_of_the_module_stays_in_place():
    both = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    symmetry = trace_symmetry(both, torch.randn(2, 3))
    assert symmetry.sizes == {"0": 4} and "1.bias" not in symmetry.axes
    assert symmetry.axes["0.weight"] == ("0", None) and symmetry.axes["1.weight"] == (None, "0")


def test_groups_move_as_blocks_and_a_single_group_freely():
    maps = (nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(1, 4), nn.Flatten())
    network, images = nets.trained(lambda: nn.Sequential(*maps, nn.Linear(36, 3)), torch.randn(2, 3, 7, 7))
    symmetry = trace_symmetry(network, images)
    assert symmetry.sizes == {"0": 3, "3": 4} and symmetry.axes["6.weight"] == (None, "3")
    check_function(network, images, symmetry)


def test_entries_that_short_inputs_do_not_reach_stay_in_place():
    """Rows of a table that no operation read might be told apart by longer inputs."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.gates = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(3, 5))
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.first(x + self.table[: x.shape[1]]) * self.gates.view(15)[:1]
            return self.last(hidden.relu())

    symmetry = trace_symmetry(Positions(), torch.randn(2, 5, 4))
    assert symmetry.sizes == {"first": 6} and "table" not in symmetry.axes and "gates" not in symmetry.axes


def test_unused_and_shared_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused = nn.Linear(3, 5), nn.Linear(5, 5)
            self.middle = nn.Linear(5, 5)
            self.again, self.last = self.middle, nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.again(self.middle(self.first(x)).relu()).relu())

    symmetry = trace_symmetry(Shared(), torch.randn(2, 3))
    assert symmetry.sizes == {"first": 5}
    assert symmetry.axes["middle.weight"] == symmetry.axes["again.weight"] == ("first", "first")
    assert not any(key.startswith("unused") for key in symmetry.axes)
    check_function(Shared().double(), torch.randn(2, 3).double(), symmetry)


@torch.library.custom_op("sane_ray_tests::upside_down", mutates_args=())
def upside_down(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@upside_down.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operation_without_a_rule_pins_what_it_touches_and_nothing_else():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.third(self.second(upside_down(self.first(x))).relu())

    assert trace_symmetry(Unknown(), torch.randn(2, 3)).sizes == {"second": 6}


def test_permutations_that_the_proof_refutes_are_dropped(monkeypatch):
    """A rule that is wrong, for cumsum, costs the permutation it claimed, and no other."""
    from sane_ray.tokens.tracing import rules

    monkeypatch.setitem(rules.RULES, "cumsum", rules.RULES["dropout"])

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.third(self.second(torch.cumsum(self.first(x), -1)).relu())

    symmetry = trace_symmetry(Wrong(), torch.randn(2, 3))
    assert symmetry.sizes == {"second": 6} and "first.weight" not in symmetry.axes


class Unlike(nn.Module):
    """Units that a wrong rule calls alike, without biases."""

    def __init__(self, inputs=3):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 6, bias=False), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.last(torch.cumsum(self.first(x), -1))


def test_the_proof_does_not_depend_on_the_values_of_the_example(monkeypatch):
    """With zeros and no biases every permutation would seem to keep the function."""
    from sane_ray.tokens.tracing import rules

    monkeypatch.setitem(rules.RULES, "cumsum", rules.RULES["dropout"])
    for example in (torch.zeros(2, 3), torch.randn(2, 3), torch.full((2, 3), float("nan"))):
        assert trace_symmetry(Unlike(), example).is_trivial


def test_integers_are_shuffled_unless_the_module_needs_them_as_they_are():
    class Offsets(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, offsets):
            if not torch.compiler.is_compiling() and offsets.tolist() != sorted(offsets.tolist()):
                raise ValueError("offsets must grow")
            return self.last(self.words(offsets))

    assert trace_symmetry(Offsets(), torch.tensor([0, 1, 3, 4, 6, 7])).sizes == {"words.weight:1": 6}
    words = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    assert len(trace_symmetry(words, torch.tensor([[1, 2, 4]])).sizes) == 2
    assert len(trace_symmetry(words, torch.zeros(1, 1, dtype=torch.long)).sizes) == 2  # nothing to shuffle


def test_functions_of_positive_numbers_alone_are_proved_on_positive_inputs():
    class Positive(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.first(x.log()).relu())

    symmetry = trace_symmetry(Positive(), torch.rand(2, 3))
    assert symmetry.sizes == {"first": 5} and symmetry.origin == "traced and proved"


def test_a_module_whose_outputs_do_not_depend_on_its_inputs_is_refused():
    class Dead(nn.Module):
        """No unit is ever active, so that no permutation could be refuted."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
            nn.init.constant_(self.first.bias, -1e6)
            self.first.bias.data[0] -= 1

        def forward(self, x):
            return self.last(self.first(x).relu())

    class Square(nn.Module):
        """Takes words whose embeddings it subtracts from each other: equal words give zeros."""

        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(5, 4), nn.Linear(4, 2, bias=False)

        def forward(self, words):
            x = self.words(words)
            return self.last(x[:, 1:] - x[:, :-1])

    with pytest.raises(InputError, match="outputs of Dead are the same for all inputs"):
        trace_symmetry(Dead(), torch.randn(2, 3))
    with pytest.raises(InputError, match="outputs of Square are the same for all inputs"):
        trace_symmetry(Square(), torch.zeros(1, 3, dtype=torch.long))
    assert trace_symmetry(Square(), torch.tensor([[0, 2, 1]])).sizes == {"words.weight:1": 4}


def test_a_module_that_runs_on_no_random_input_is_refused():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            if not torch.compiler.is_compiling() and float(x.detach().abs().max()) < 5:
                raise ValueError("too small")
            return self.last(self.first(x))

    with pytest.raises(InputError, match=r"Picky does not run on random inputs .*: too small"):
        trace_symmetry(Picky(), torch.full((2, 3), 10.0))


def test_inputs_may_be_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x, *, scale):
            return {"logits": self.last(self.first(x * scale).relu())}

    inputs = {"x": torch.randn(2, 3), "scale": 2.0}
    assert trace_symmetry(Named(), inputs).sizes == {"first": 5}
    with pytest.raises(InputError, match="Named does not run on these example inputs"):
        trace_symmetry(Named(), torch.randn(2, 3))


def test_a_module_that_cannot_be_traced_is_refused_by_name():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="Branching cannot be traced"):
        trace_symmetry(Branching(), torch.randn(2, 3))
    with pytest.raises(InputError, match="Linear does not run on these example inputs"):
        trace_symmetry(nn.Linear(3, 2), torch.randn(2, 4))


def test_axes_that_cannot_match_are_pinned():
    space = Space()
    six = space.fresh(6)
    first = space.times(space.fresh(2), space.fresh(3))
    second = space.times(space.fresh(3), space.fresh(2))
    space.tie(six, first)
    assert len(space.resolve(six)[0]) == 2
    space.tie(six, second)
    assert space.resolve(six) == fixed(6) == space.resolve(first) == space.resolve(second)


def test_an_axis_is_cut_and_factored_wherever_it_stands():
    space = Space()
    rows, columns = space.fresh(12), space.fresh(12)
    space.tie(rows, columns)
    heads, head = space.split(rows, [3, 4])
    assert space.resolve(columns) == space.times(heads, head)
    before, after = space.cut(columns, 4)
    assert space.size(before) == 4 and space.size(after) == 8
    assert space.resolve(rows) == space.resolve(before + after)
    before, after = space.cut(columns, 6)  # within a head
    assert space.size(before) == 6 and space.resolve(rows) == space.resolve(before + after)


def moved(space, dim, permutations):
    """Where each entry of an axis comes from when its atoms are permuted."""
    order, rng = [], np.random.default_rng(len(permutations))
    for segment in space.resolve(dim):
        sources = np.zeros(1, dtype=int)
        for factor in segment:
            size = space.segment_size((factor,))
            own = np.arange(size) if factor < 0 else permutations.setdefault(factor, rng.permutation(size))
            sources = (sources[:, None] * size + own).reshape(-1)
        order.append(sources + sum(map(len, order)))
    return np.concatenate(order)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_tied_cut_and_factored_moves_alike(seed):
    """Random relations between axes of 12 entries; in the end every one of them must hold for what may move."""
    rng = np.random.default_rng(seed)
    space = Space()
    axes = [space.fresh(12) for _ in range(5)]
    wholes, ties = [], []
    for _ in range(7):
        first, second = (axes[int(place)] for place in rng.choice(len(axes), 2, replace=False))
        match int(rng.integers(4)):
            case 0:
                ties.append((first, second))
                space.tie(first, second)
            case 1:
                at = int(rng.integers(1, 12))
                head, tail = space.cut(first, at)
                wholes.append((first, (head, tail)))
                other_tail, other_head = space.cut(second, 12 - at)
                axes.append(head + other_tail)
                wholes.append((second, (other_tail, other_head)))
            case 2:
                sizes = [[2, 6], [3, 4], [2, 3, 2], [4, 3], [12, 1], [1, 12]][int(rng.integers(6))]
                parts = space.split(first, sizes)
                assert [space.size(part) for part in parts] == sizes
                axes.append(space.times(*reversed(parts)))
            case 3 if rng.random() < 0.2:
                space.pin(first)
    permutations = {}
    for axis in axes:
        space.resolve(axis)
    for first, second in ties:
        assert np.array_equal(moved(space, first, permutations), moved(space, second, permutations))
    for whole, (head, tail) in wholes:
        parts = (moved(space, head, permutations), moved(space, tail, permutations) + space.size(head))
        assert np.array_equal(moved(space, whole, permutations), np.concatenate(parts))
    for axis in axes:
        order = moved(space, axis, permutations)
        assert np.array_equal(np.sort(order), np.arange(len(order)))


def test_what_is_no_module_is_said():
    with pytest.raises(InputError, match="a dict cannot be traced: give the torch module itself"):
        trace_symmetry({"weight": torch.ones(2)}, torch.ones(1))  # type: ignore[arg-type]
