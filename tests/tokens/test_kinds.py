import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from sane_ray.tokens.tokenizer import build_layer_table, detokenize, discover_token_size, tokenize


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.gamma = nn.Parameter(torch.randn(8))
        self.register_buffer("inv_freq", torch.randn(4))
        self.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int64))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 2)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.position_embeddings = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.router = nn.Linear(4, 3, bias=False)
        self.experts = nn.ParameterDict(
            {"gate_up_proj": torch.randn(3, 4, 10), "gate_up_proj_bias": torch.randn(3, 10), "w2": torch.randn(3, 5, 4)}
        )
        self.q_proj = nn.Linear(4, 4, bias=False)


def batch_norm():
    module = nn.BatchNorm2d(4)
    module(torch.randn(3, 4, 2, 2))
    return module


MODULES = {
    "linear": (lambda: nn.Linear(3, 2), {"weight": ("linear", "bias")}),
    "linear without bias": (lambda: nn.Linear(3, 2, bias=False), {"weight": ("linear", None)}),
    "conv1d": (lambda: nn.Conv1d(3, 2, 3), {"weight": ("conv", "bias")}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), {"weight": ("conv", "bias")}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"weight": ("conv", "bias")}),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), {"weight": ("conv", "bias")}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), {"weight": ("conv_transpose", None), "bias": ("bias", None)}),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        {"weight": ("conv_transpose", None), "bias": ("bias", None)},
    ),
    "transposed, named": (
        lambda: nn.ModuleDict({"deconv1": nn.ConvTranspose1d(4, 4, 2)}),
        {"deconv1.weight": ("conv_transpose", None), "deconv1.bias": ("bias", None)},
    ),
    "embedding": (
        lambda: nn.ModuleDict({"word_embeddings": nn.Embedding(5, 3)}),
        {"word_embeddings.weight": ("embedding", None)},
    ),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), {"weight": ("conv", "bias")}),
    "batch norm": (
        batch_norm,
        {"weight": ("norm", "bias"), "running_mean": ("running_mean", None), "running_var": ("running_var", None)},
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), {"weight": ("norm", "bias")}),
    "layer norm": (lambda: nn.LayerNorm(4), {"weight": ("norm", "bias")}),
    "layer norm of maps": (lambda: nn.LayerNorm((4, 3)), {"weight": ("norm", None), "bias": ("bias", None)}),
    "rms norm": (lambda: nn.RMSNorm(4), {"weight": ("norm", None)}),
    "prelu": (lambda: nn.PReLU(), {"weight": ("other", None)}),
    "lstm": (
        lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
        {
            f"weight_{part}_l0{way}": ("recurrent", None if part == "hr" else f"bias_{part}_l0{way}")
            for way, part in itertools.product(("", "_reverse"), ("ih", "hh", "hr"))
        },
    ),
    "gru without bias": (
        lambda: nn.GRU(3, 4, bias=False),
        {"weight_ih_l0": ("recurrent", None), "weight_hh_l0": ("recurrent", None)},
    ),
    "cell": (
        lambda: nn.GRUCell(3, 4),
        {"weight_ih": ("recurrent", "bias_ih"), "weight_hh": ("recurrent", "bias_hh")},
    ),
    "attention": (
        lambda: nn.ModuleDict({"self_attn": nn.MultiheadAttention(4, 2)}),
        {
            "self_attn.in_proj_weight": ("attention", "self_attn.in_proj_bias"),
            "self_attn.out_proj.weight": ("attention", "self_attn.out_proj.bias"),
        },
    ),
    "attention of other sizes": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        {
            "q_proj_weight": ("attention", None),
            "k_proj_weight": ("attention", None),
            "v_proj_weight": ("attention", None),
            "in_proj_bias": ("bias", None),
            "bias_k": ("bias", None),
            "bias_v": ("bias", None),
            "out_proj.weight": ("linear", "out_proj.bias"),
        },
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 2)),
        {
            "parametrizations.weight.original0": ("weight_norm", None),
            "parametrizations.weight.original1": ("conv", "bias"),
        },
    ),
    "weight norm, old style": (
        lambda: nn.ModuleDict({"a": weight_norm(nn.Linear(3, 4))}),
        {"a.weight_g": ("weight_norm", None), "a.weight_v": ("linear", "a.bias")},
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
        {
            "parametrizations.weight.original": ("linear", "bias"),
            "parametrizations.weight.0._u": ("other", None),
            "parametrizations.weight.0._v": ("other", None),
        },
    ),
    "spectral norm, old style": (
        lambda: spectral_norm(nn.Linear(3, 4)),
        {"weight_orig": ("linear", "bias"), "weight_u": ("other", None), "weight_v": ("other", None)},
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6), 1, enable_nested_tensor=False),
        {
            "layers.0.self_attn.in_proj_weight": ("attention", "layers.0.self_attn.in_proj_bias"),
            "layers.0.self_attn.out_proj.weight": ("attention", "layers.0.self_attn.out_proj.bias"),
            "layers.0.linear1.weight": ("linear", "layers.0.linear1.bias"),
            "layers.0.linear2.weight": ("linear", "layers.0.linear2.bias"),
            "layers.0.norm1.weight": ("norm", "layers.0.norm1.bias"),
            "layers.0.norm2.weight": ("norm", "layers.0.norm2.bias"),
        },
    ),
    "vision transformer": (
        VisionTransformer,
        {
            "cls_token": ("embedding", None),
            "pos_embed": ("position", None),
            "relative_position_bias_table": ("position", None),
            "gamma": ("other", None),
            "inv_freq": ("position", None),
            "patch_embed.proj.weight": ("conv", "patch_embed.proj.bias"),
            "blocks.0.attn.qkv.weight": ("attention", "blocks.0.attn.qkv.bias"),
            "norm.weight": ("norm", "norm.bias"),
            "head.weight": ("linear", "head.bias"),
        },
    ),
    "mixture of experts": (
        Experts,
        {
            "embed_tokens.weight": ("embedding", None),
            "position_embeddings.weight": ("position", None),
            "router.weight": ("linear", None),
            "experts.gate_up_proj": ("linear", None),
            "experts.gate_up_proj_bias": ("bias", None),
            "experts.w2": ("linear", None),
            "q_proj.weight": ("attention", None),
        },
    ),
    "norm of another framework": (
        lambda: nn.ParameterDict({"gamma": torch.randn(3), "beta": torch.randn(3)}),
        {"gamma": ("norm", None), "beta": ("bias", None)},
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODULES)
def test_kinds_and_biases_of_torch_modules_in_the_order_of_their_state_dict(name):
    make, expected = MODULES[name]
    torch.manual_seed(0)
    state_dict = make().state_dict()
    table = build_layer_table(state_dict)
    assert {layer.key: (layer.kind, layer.bias_key) for layer in table.layers} == expected
    order = [key for key in state_dict if key in expected]
    assert [layer.key for layer in table.layers] == order
    assert table.parameters == sum(value.numel() for value in state_dict.values() if value.is_floating_point())
    for layout, size in itertools.product(("sparse", "dense", "mixed"), (1, 5, 64)):
        table = build_layer_table(state_dict, token_size=size, layout=layout)
        restored = detokenize(tokenize(state_dict, table), table, reference=state_dict)
        assert all(torch.equal(restored[key], value) for key, value in state_dict.items())
        assert list(restored) == list(state_dict)


def test_a_bias_is_the_column_of_one_weight_only():
    state_dict = {"weight_orig": torch.randn(3, 2), "weight": torch.randn(3, 2), "bias": torch.randn(3)}
    table = build_layer_table(state_dict)
    assert [(layer.key, layer.bias_key) for layer in table.layers] == [("weight_orig", "bias"), ("weight", None)]


def test_kinds_do_not_depend_on_values_or_devices():
    state_dict = VisionTransformer().state_dict()
    meta = {key: value.to("meta") for key, value in state_dict.items()}
    assert build_layer_table(meta) == build_layer_table(state_dict)


def test_tables_of_positions_and_stacked_experts_do_not_make_the_token_size():
    assert discover_token_size(VisionTransformer().state_dict()) == 3 * 2 * 2 + 1
    assert discover_token_size(Experts().state_dict()) == 4
    assert discover_token_size({"pos_embed": torch.zeros(1, 5, 8), "temperature": torch.tensor(1.0)}) == 40


@pytest.mark.parametrize("key", ["", ".", "weight.", "ä" * 300 + ".weight", "a." * 150 + "weight", "参数.重み"])
def test_odd_names_are_names_like_any_other(key):
    state_dict = {key: torch.randn(2, 3), "bias": torch.randn(4)}
    table = build_layer_table(state_dict, layout="dense", token_size=4)
    assert {layer.key for layer in table.layers} == state_dict.keys()
    assert torch.equal(detokenize(tokenize(state_dict, table), table)[key], state_dict[key])
