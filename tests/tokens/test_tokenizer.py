import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import (
    LayerTable,
    build_layer_table,
    detokenize,
    discover_token_size,
    tokenize,
)
from sane_ray.zoo.checkpoint import load_state_dict

MODULE_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def cnn_a(parity):
    return load_state_dict(parity / "cnn_a.safetensors")


def small_bn(parity):
    stored = load_file(parity / "small_bn.safetensors")
    keys = [f"{module}.{name}" for module in ("conv1", "bn1", "conv2", "bn2", "fc") for name in MODULE_ENTRIES]
    return {key: stored[key] for key in keys if key in stored}


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def linear(inputs=3, outputs=2, **extra):
    return {"a.weight": torch.randn(outputs, inputs), "a.bias": torch.randn(outputs), **extra}


@pytest.mark.parametrize(
    ("network", "token_size", "batch_norm", "file"),
    [
        (cnn_a, 0, "keep", "cnn_a_tokens.npz"),
        (cnn_a, 32, "keep", "cnn_a_tokens_t32.npz"),
        (small_bn, 16, "keep", "small_bn_tokens_t16_ignore_bn_false.npz"),
        (small_bn, 16, "ignore", "small_bn_tokens_t16_ignore_bn_true.npz"),
    ],
)
def test_tokens_positions_and_mask_equal_the_published_code(parity, network, token_size, batch_norm, file):
    state_dict, published = network(parity), np.load(parity / file)
    table = build_layer_table(state_dict, token_size=token_size, batch_norm=batch_norm)
    tokens = tokenize(state_dict, table)
    assert torch.equal(bits(tokens), bits(torch.from_numpy(published["tokens"])))
    assert np.array_equal(table.positions, published["pos"])
    assert np.array_equal(np.arange(table.token_size) < table.signal_counts[:, None], published["mask"])
    assert table.num_tokens == len(published["tokens"]) and table.token_size == published["tokens"].shape[1]
    assert table.parameters == published["mask"].sum() == table.signal_counts.sum()
    assert np.array_equal(table.layer_of_token, published["pos"][:, 1])
    assert table.position_sizes == tuple(published["pos"].max(axis=0) + 1)


def resnet18(classes):
    """Shapes of the published ResNet-18, without memory."""

    def convolution(name, outputs, inputs, kernel, norm):
        shapes = {f"{norm}.{entry}": (outputs,) for entry in MODULE_ENTRIES[:4]}
        return {f"{name}.weight": (outputs, inputs, kernel, kernel), **shapes}

    shapes, width = convolution("conv1", 64, 3, 3, "bn1"), 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in (f"layer{stage}.0", f"layer{stage}.1"):
            shapes |= convolution(f"{block}.conv1", outputs, width, 3, f"{block}.bn1")
            shapes |= convolution(f"{block}.conv2", outputs, outputs, 3, f"{block}.bn2")
            if width != outputs:
                shapes |= convolution(f"{block}.downsample.0", outputs, width, 1, f"{block}.downsample.1")
            width = outputs
    shapes |= {"fc.weight": (classes, 512), "fc.bias": (classes,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("classes", "token_size", "batch_norm", "tokens", "layers", "signal"),
    [
        (10, 288, "keep", 53524, 81, 0.7255),
        (10, 288, "ignore", 39124, 21, 0.9908),
        (100, 288, "keep", 53704, 81, 0.7261),
        (200, 288, "ignore", 39504, 21, 0.9899),
        (10, 513, "keep", 38282, 81, 0.570),
        (10, 513, "ignore", 23882, 21, 0.911),
    ],
)
def test_resnet18_has_the_published_number_of_tokens(classes, token_size, batch_norm, tokens, layers, signal):
    table = build_layer_table(resnet18(classes), token_size=token_size, batch_norm=batch_norm)
    assert table.num_tokens == tokens and table.position_sizes == (tokens, layers, 512)
    assert table.parameters / (tokens * token_size) == pytest.approx(signal, abs=1e-3)


@pytest.mark.parametrize("network", [cnn_a, small_bn])
@pytest.mark.parametrize("token_size", [0, 1, 7, 37, 1000])
@pytest.mark.parametrize("batch_norm", ["keep", "ignore"])
def test_detokenize_is_the_exact_inverse(parity, network, token_size, batch_norm):
    state_dict = network(parity)
    table = build_layer_table(state_dict, token_size=token_size, batch_norm=batch_norm)
    tokens = tokenize(state_dict, table)
    restored = detokenize(tokens, table, reference=state_dict)
    assert list(restored) == list(state_dict)
    for key, value in state_dict.items():
        assert restored[key].dtype == value.dtype and restored[key].shape == value.shape
        assert torch.equal(restored[key], value)
    assert torch.equal(bits(tokenize(restored, table)), bits(tokens))


def test_without_a_reference_only_tokenized_keys_come_back_and_tokenize_again(parity):
    state_dict = small_bn(parity)
    table = build_layer_table(state_dict, token_size=16, batch_norm="ignore")
    restored = detokenize(tokenize(state_dict, table), table)
    assert list(restored) == ["conv1.weight", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias"]
    assert torch.equal(tokenize(restored, table), tokenize(state_dict, table))


def test_token_size_is_the_widest_channel_with_or_without_bias(parity):
    assert discover_token_size(cnn_a(parity)) == 201
    state_dict = {"conv.weight": torch.zeros(2, 4, 3, 3), "fc.weight": torch.zeros(5, 2), "fc.bias": torch.zeros(5)}
    assert discover_token_size(state_dict) == 36
    assert build_layer_table(state_dict).token_size == 36
    norm = {"n.running_mean": torch.zeros(3), "n.running_var": torch.ones(3)}
    widths = {"n.weight": torch.ones(3), "n.bias": torch.ones(3), "thin.weight": torch.zeros(3, 1)}
    assert discover_token_size({**norm, **widths}) == 2
    assert discover_token_size({**norm, **widths}, batch_norm="ignore") == 1


def test_batch_norm_is_recognised_by_structure_not_by_letters():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.Linear(3, 4)
            self.scale = nn.BatchNorm1d(4)
            self.plain = nn.BatchNorm1d(4, affine=False)
            self.batchnorm = nn.LayerNorm(4)

    state_dict = Network().state_dict()
    kinds = {layer.key: layer.kind for layer in build_layer_table(state_dict).layers}
    assert kinds == {
        "bn.weight": "linear",
        "scale.weight": "norm",
        "scale.running_mean": "running_mean",
        "scale.running_var": "running_var",
        "plain.running_mean": "running_mean",
        "plain.running_var": "running_var",
        "batchnorm.weight": "norm",
    }
    ignored = build_layer_table(state_dict, batch_norm="ignore")
    assert [layer.key for layer in ignored.layers] == ["bn.weight", "batchnorm.weight"]
    assert {entry.key: entry.reason for entry in ignored.untokenized}["scale.bias"] == "batch norm is ignored"


def test_kept_batch_norm_is_three_layers_of_two_one_and_one_values_a_channel(parity):
    table = build_layer_table(small_bn(parity), token_size=16)
    layers = [(layer.key, layer.kind, layer.width, layer.channels, layer.bias_key) for layer in table.layers[1:4]]
    assert layers == [
        ("bn1.weight", "norm", 2, 4, "bn1.bias"),
        ("bn1.running_mean", "running_mean", 1, 4, None),
        ("bn1.running_var", "running_var", 1, 4, None),
    ]


ODD = {
    "cls_token": torch.randn(1, 1, 4),
    "attention.in_proj_weight": torch.randn(6, 2),
    "weight_net.weight_g": torch.randn(3),
    "lonely.bias": torch.randn(3),
    "transposed.weight": torch.randn(2, 5, 3, 3),
    "transposed.bias": torch.randn(5),
    "half_norm.running_mean": torch.randn(3),
    "scalar.weight": torch.tensor(1.5),
    "temperature": torch.tensor(0.5),
    "rotary.inv_freq": torch.randn(3),
}
UNUSABLE = {
    "counter.num_batches_tracked": (torch.tensor(3), "torch.int64 is not floating point"),
    "attention.mask": (torch.ones(2, 2, dtype=torch.bool), "torch.bool is not floating point"),
    "attention.bias": (torch.ones(1, 1, 2, 2, dtype=torch.uint8), "torch.uint8 is not floating point"),
    "fourier.weight": (torch.zeros(3, 3, dtype=torch.complex64), "torch.complex64 is not floating point"),
    "empty.weight": (torch.zeros(0, 3), "holds no values"),
    "sparse.weight": (torch.eye(3).to_sparse(), "torch.sparse_coo is not dense"),
    "extra_state": ({"version": 1}, "not a tensor"),
}


def test_every_floating_point_tensor_becomes_tokens_in_the_order_of_the_state_dict():
    state_dict = {**ODD, **linear()}
    table = build_layer_table(state_dict, token_size=4)
    assert [layer.key for layer in table.layers] == [*ODD, "a.weight"] and not table.untokenized
    kinds = ["embedding", "attention", "other", "bias", "conv_transpose", "bias", "running_mean", "other", "other"]
    assert [layer.kind for layer in table.layers] == [*kinds, "position", "linear"]
    assert table.parameters == sum(value.numel() for value in state_dict.values())
    restored = detokenize(tokenize(state_dict, table), table)
    assert all(torch.equal(restored[key], value) for key, value in state_dict.items())
    assert restored["scalar.weight"].shape == ()


def test_what_cannot_become_tokens_is_listed_with_its_reason_and_returns_from_the_reference():
    state_dict = linear(**{key: value for key, (value, _) in UNUSABLE.items()})
    table = build_layer_table(state_dict)
    assert [layer.key for layer in table.layers] == ["a.weight"]
    assert {entry.key: entry.reason for entry in table.untokenized} == {key: why for key, (_, why) in UNUSABLE.items()}
    restored = detokenize(tokenize(state_dict, table), table, reference=state_dict)
    assert list(restored) == list(state_dict)
    assert restored["extra_state"] == {"version": 1} and restored["counter.num_batches_tracked"] == 3


def test_parameters_weights_takes_what_the_published_code_takes():
    table = build_layer_table(linear(**ODD), parameters="weights")
    taken = ["a.weight", "attention.in_proj_weight", "weight_net.weight_g", "transposed.weight"]
    assert [layer.key for layer in table.layers] == [*taken, "half_norm.running_mean", "scalar.weight"]
    assert {entry.key: entry.reason for entry in table.untokenized} == {
        "cls_token": "named cls_token, and only weights, their biases and running statistics are taken",
        "lonely.bias": "bias without a weight beside it that has a channel for each of its values",
        "transposed.bias": "bias without a weight beside it that has a channel for each of its values",
        "temperature": "named temperature, and only weights, their biases and running statistics are taken",
        "rotary.inv_freq": "named inv_freq, and only weights, their biases and running statistics are taken",
    }


@pytest.mark.parametrize(
    "quantised",
    [
        {"b.weight": torch.zeros(3, 3, dtype=torch.int8)},
        {"b.qweight": torch.zeros(3, 3, dtype=torch.int32)},
        {"b.codes": torch.zeros(3, 3, dtype=torch.uint8), "b.scales": torch.ones(3)},
        {"b.parametrizations.weight.original": torch.zeros(3, 3, dtype=torch.uint8)},
        {"b.weight": torch.zeros(3, 3, dtype=torch.float4_e2m1fn_x2)},
    ],
)
def test_a_quantised_weight_is_refused_by_name_and_not_left_out(quantised):
    key, value = next(iter(quantised.items()))
    with pytest.raises(InputError, match=f"{key} is {value.dtype}, a quantised weight: dequantise it first"):
        build_layer_table({**linear(), **quantised, "norm.weight": torch.ones(3)})


def test_a_weight_without_a_module_finds_its_bias():
    table = build_layer_table(nn.Linear(3, 2).state_dict())
    assert [(layer.key, layer.bias_key) for layer in table.layers] == [("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts_become_float32_and_return_to_the_reference_dtype(dtype):
    state_dict = {"a.weight": torch.randn(4, 6).to(dtype).t(), "a.bias": torch.randn(12).to(dtype)[::2]}
    assert not state_dict["a.weight"].is_contiguous()
    table = build_layer_table(state_dict, token_size=3)
    tokens = tokenize(state_dict, table)
    assert tokens.dtype == torch.float32
    expected = torch.cat([state_dict["a.weight"].float(), state_dict["a.bias"].float()[:, None]], dim=1)
    assert torch.equal(tokens.view(6, 6)[:, :5], expected) and not tokens.view(6, 6)[:, 5].any()
    restored = detokenize(tokens, table, reference=state_dict)
    for key, value in state_dict.items():
        assert restored[key].dtype == dtype
        assert torch.equal(restored[key], value.float().to(dtype))


def test_detokenized_weights_share_no_memory_and_ignore_what_stands_in_the_padding():
    state_dict = linear(running=torch.ones(2))
    table = build_layer_table(state_dict, token_size=4)
    exact = tokenize(state_dict, table)
    restored = detokenize(exact, table, reference=state_dict)
    for value in restored.values():
        value.zero_()
    assert exact.abs().sum() > 0 and state_dict["running"].sum() == 2
    padded = build_layer_table(state_dict, token_size=5)
    noisy = tokenize(state_dict, padded)
    noisy[:, 4:] = torch.nan
    assert torch.equal(detokenize(noisy, padded)["a.weight"], state_dict["a.weight"])


def test_gradients_flow_from_weights_to_tokens():
    state_dict = linear()
    table = build_layer_table(state_dict, token_size=3)
    tokens = tokenize(state_dict, table).requires_grad_()
    sum(value.sum() for value in detokenize(tokens, table).values()).backward()
    signal = torch.arange(3) < torch.from_numpy(table.signal_counts)[:, None]
    assert torch.equal(tokens.grad, signal.float())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("a.weight"), "lacks a.weight"),
        (lambda d: d.pop("a.bias"), "lacks a.bias"),
        (lambda d: d.update({"a.weight": torch.zeros(2, 4)}), r"a.weight has shape \(2, 4\)"),
        (lambda d: d.update({"a.bias": torch.zeros(3)}), "a.bias has shape"),
        (lambda d: d.update({"b.weight": torch.zeros(2, 4)}), "has b.weight"),
        (lambda d: d.update({"a.weight": torch.zeros(2, 3, dtype=torch.int64)}), "a.weight is torch.int64"),
    ],
)
def test_a_state_dict_of_another_architecture_is_refused_by_key(change, named):
    state_dict = linear()
    table = build_layer_table(state_dict)
    tokens = tokenize(state_dict, table)
    change(state_dict)
    with pytest.raises(InputError, match=named):
        tokenize(state_dict, table)
    with pytest.raises(InputError, match=named):
        detokenize(tokens, table, reference=state_dict)


def test_tokens_of_another_size_and_unusable_input_are_refused():
    table = build_layer_table(linear())
    with pytest.raises(InputError, match=r"\(2, 5\).*2 tokens of size 4"):
        detokenize(torch.zeros(2, 5), table)
    with pytest.raises(InputError, match="token_size is -1"):
        build_layer_table(linear(), token_size=-1)
    with pytest.raises(InputError, match="found step"):
        build_layer_table({"step": torch.tensor(3)})
    with pytest.raises(InputError, match="found nothing"):
        discover_token_size({})


@pytest.mark.parametrize("layout", ["sparse", "dense", "mixed"])
def test_a_table_survives_json_and_pickle(parity, layout):
    table = build_layer_table(small_bn(parity), token_size=16, layout=layout)
    again = LayerTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table and hash(again) == hash(table) and again.fingerprint == table.fingerprint
    size = len(pickle.dumps(table))
    assert table.positions.size and len(pickle.dumps(table)) == size  # cached arrays do not travel
    assert pickle.loads(pickle.dumps(table)) == table


def test_the_fingerprint_identifies_the_architecture_and_not_its_tokens():
    base = build_layer_table(linear()).fingerprint
    assert build_layer_table(linear(), token_size=1).fingerprint == base
    assert build_layer_table(linear(), token_size=3, layout="dense").fingerprint == base
    others = [
        linear(inputs=4),
        {"b.weight": torch.zeros(2, 3), "b.bias": torch.zeros(2)},
        {"a.weight": torch.zeros(2, 3)},
        linear(**{"b.weight": torch.zeros(1, 1)}),
        {"b.weight": torch.zeros(1, 1), **linear()},
        linear(cls_token=torch.zeros(1)),
        linear(cls_token=torch.zeros(2)),
    ]
    fingerprints = {build_layer_table(other).fingerprint for other in others}
    assert len(fingerprints) == len(others) and base not in fingerprints
