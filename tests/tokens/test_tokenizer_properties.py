"""Random state dicts of every dtype and memory layout, against a tokeniser that is as plain as can be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import build_layer_table, detokenize, tokenize, tokenize_range

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NARROW = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
LAYOUTS = ("sparse", "dense", "mixed")
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def bits(tensor):
    """The bits of each value, all NaN alike: conversions may set the quiet bit of a NaN."""
    raw = tensor.contiguous().view(WIDTHS[tensor.element_size()])
    return torch.where(tensor.double().isnan(), torch.full_like(raw, 1), raw)


def random_bits(shape, dtype, generator):
    """Every bit pattern of a dtype is as likely: negative zeros, subnormals, infinities and NaN are among them."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (max(math.prod(shape), 1) * size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)[: math.prod(shape)].reshape(shape)


def stored_as(tensor, memory):
    """The same values in another memory layout."""
    if memory == "reversed axes":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if memory == "every second":
        wide = torch.zeros(*tensor.shape, 2).to(tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    return tensor


@st.composite
def state_dicts(draw, dtypes=NARROW):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state_dict = {}
    for module in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
        bias = draw(st.sampled_from([None, shape[:1], [3]]))
        name = draw(st.sampled_from(["weight", "weight_ih_l0", "cls_token"]))
        for key, size in ((name, shape), (name.replace("weight", "bias"), bias)):
            if size is not None and f"{module}.{key}" not in state_dict:
                tensor = random_bits(size, draw(st.sampled_from(dtypes)), generator)
                memory = draw(st.sampled_from(["contiguous", "reversed axes", "every second"]))
                state_dict[f"{module}.{key}"] = stored_as(tensor, memory)
    return state_dict


def plain_tokens(state_dict, table, dtype):
    """Layer by layer and row by row, nothing clever."""
    tokens, positions, signal = [], [], []
    for index, layer in enumerate(table.layers):
        rows = state_dict[layer.key].to(dtype).reshape(layer.channels, -1).tolist()
        if layer.bias_key is not None:
            biases = state_dict[layer.bias_key].to(dtype).reshape(-1).tolist()
            rows = [[*row, bias] for row, bias in zip(rows, biases, strict=True)]
        runs = [[(value, channel) for channel, row in enumerate(rows) for value in row]]
        if not layer.dense:
            runs = [[(value, channel) for value in row] for channel, row in enumerate(rows)]
        for run in runs:
            for start in range(0, len(run), table.token_size):
                cut = run[start : start + table.token_size]
                positions.append([len(tokens), index, cut[0][1]])
                signal.append(len(cut))
                tokens.append([value for value, _ in cut] + [0.0] * (table.token_size - len(cut)))
    return torch.tensor(tokens, dtype=torch.float64).to(dtype), np.array(positions), np.array(signal)


@PROPERTY
@given(state_dicts(), st.integers(1, 40), st.sampled_from(LAYOUTS))
def test_tokens_are_those_of_the_plain_tokenizer_and_their_inverse_is_exact(state_dict, token_size, layout):
    table = build_layer_table(state_dict, token_size=token_size, layout=layout)
    tokens = tokenize(state_dict, table)
    plain, positions, signal = plain_tokens(state_dict, table, torch.float32)
    assert torch.equal(bits(tokens), bits(plain))
    assert np.array_equal(table.positions, positions) and np.array_equal(table.signal_counts, signal)
    assert table.position_sizes == tuple(positions.max(axis=0) + 1)
    assert table.parameters == signal.sum() == sum(value.numel() for value in state_dict.values())
    restored = detokenize(tokens, table, reference=state_dict)
    assert list(restored) == list(state_dict)
    for key, value in state_dict.items():
        assert restored[key].dtype == value.dtype and restored[key].shape == value.shape
        assert torch.equal(bits(restored[key]), bits(value))
    assert table.resized(token_size + 3).resized(token_size) == table


@PROPERTY
@given(state_dicts((torch.float64, *NARROW)), st.integers(1, 40), st.sampled_from(LAYOUTS))
def test_float64_tokens_keep_float64_weights_and_float32_tokens_round_them(state_dict, token_size, layout):
    table = build_layer_table(state_dict, token_size=token_size, layout=layout)
    for dtype in (torch.float32, torch.float64):
        restored = detokenize(tokenize(state_dict, table, dtype), table, reference=state_dict)
        for key, value in state_dict.items():
            assert torch.equal(bits(restored[key]), bits(value.to(dtype).to(value.dtype)))


@PROPERTY
@given(state_dicts(), st.integers(1, 40), st.sampled_from(LAYOUTS), st.data())
def test_a_range_is_that_slice_of_the_model_and_reads_no_more_than_it_holds(state_dict, token_size, layout, data):
    table = build_layer_table(state_dict, token_size=token_size, layout=layout)
    start = data.draw(st.integers(0, table.num_tokens))
    stop = data.draw(st.integers(start, table.num_tokens))
    asked = []

    def read(key, first, end):
        asked.append(end - first)
        return state_dict[key].reshape(-1)[first:end]

    tokens = tokenize_range(read, table, start, stop)
    assert torch.equal(bits(tokens), bits(tokenize(state_dict, table)[start:stop]))
    assert sum(asked) == table.signal_counts[start:stop].sum()
    assert np.array_equal(table.signal_of(start, stop), table.signal_counts[start:stop])
    assert np.array_equal(table.positions_of(start, stop), table.positions[start:stop])
    assert np.array_equal(table.layers_of(start, stop), table.layer_of_token[start:stop])
    used = torch.full((stop - start, token_size), torch.nan)
    assert tokenize_range(read, table, start, stop, out=used) is used
    assert torch.equal(bits(used), bits(tokens))


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 90)), min_size=1, max_size=5),
    st.integers(1, 40),
)
@example([(4, 3)], 4)  # a quarter padding, and no more
def test_mixed_is_dense_just_where_more_than_a_quarter_would_be_padding(shapes, token_size):
    state_dict = {f"{index}.weight": torch.zeros(shape) for index, shape in enumerate(shapes)}
    sparse, dense, mixed = (build_layer_table(state_dict, token_size=token_size, layout=name) for name in LAYOUTS)
    for one, other, chosen in zip(sparse.layers, dense.layers, mixed.layers, strict=True):
        padding = 1 - one.channels * one.width / (one.num_tokens * token_size)
        assert chosen == (other if padding > 0.25 else one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges_of_a_row_and_of_a_model_larger_than_memory(layout):
    billion = 10**9
    meta = {
        "long.weight": torch.empty(1, billion, device="meta"),
        "long.bias": torch.empty(1, device="meta"),
        "tall.weight": torch.empty(3 * billion, 7, device="meta"),
        "tall.bias": torch.empty(3 * billion, device="meta"),
    }
    table = build_layer_table(meta, token_size=300, layout=layout)
    asked = []

    def read(key, start, stop):
        asked.append(stop - start)
        first = {"long.weight": 0, "long.bias": 9, "tall.weight": 0, "tall.bias": 500}[key]
        return (torch.arange(start, stop) % 1000 + first).float()

    middle = tokenize_range(read, table, 1000, 1200)
    assert torch.equal(middle.reshape(-1), (torch.arange(300_000, 360_000) % 1000).float())
    start = table.num_tokens - 4
    end = tokenize_range(read, table, start, table.num_tokens)
    assert sum(asked) == 60_000 + table.signal_of(start, table.num_tokens).sum()
    assert end.reshape(-1)[-300:].nonzero().max() == table.signal_of(start, table.num_tokens)[-1] - 1
    first = int(table.layer_starts[1])
    seam = tokenize_range(read, table, first - 1, first + 1)
    assert seam[0, 100] == 9 and not seam[0, 101:].any()  # the last hundred weights and the bias: 10^9 = 300 k + 100
    assert seam[1, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 500, 0 if layout == "sparse" else 7]
    assert table.positions_of(start, start + 1)[0, 1] == 1


def test_positions_of_a_large_model_are_computed_for_the_range():
    state_dict = {"a.weight": torch.empty(70_000, 9), "a.bias": torch.empty(70_000), "b.weight": torch.empty(60_000, 2)}
    for layout in LAYOUTS:
        table = build_layer_table(state_dict, token_size=2, layout=layout)
        assert table.num_tokens > 400_000
        for start, stop in ((0, 3), (349_990, 350_020), (table.num_tokens - 5, table.num_tokens), (7, 7)):
            assert np.array_equal(table.positions_of(start, stop), table.positions[start:stop])
            assert np.array_equal(table.signal_of(start, stop), table.signal_counts[start:stop])
            assert np.array_equal(table.layers_of(start, stop), table.layer_of_token[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (1, 99), (2, 1)])
def test_ranges_that_a_model_does_not_have_are_refused(start, stop):
    table = build_layer_table({"weight": torch.zeros(3, 2)})
    for ask in (table.positions_of, table.signal_of, table.layers_of):
        with pytest.raises(InputError, match=f"tokens {start} to {stop} do not lie in a model of 3"):
            ask(start, stop)
    with pytest.raises(InputError, match=f"tokens {start} to {stop} do not lie in a model of 3"):
        tokenize_range(lambda key, first, end: torch.zeros(end - first), table, start, stop)


def test_a_checkpoint_that_gives_too_few_or_quantised_values_is_refused():
    table = build_layer_table({"weight": torch.zeros(3, 2)})
    with pytest.raises(InputError, match="weight gave 1 of its values 0 to 6"):
        tokenize_range(lambda key, first, end: torch.zeros(1), table, 0, 3)
    with pytest.raises(InputError, match=r"weight is torch.int8.*dequantise"):
        tokenize_range(lambda key, first, end: torch.zeros(end - first, dtype=torch.int8), table, 0, 3)
