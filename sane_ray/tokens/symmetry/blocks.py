"""Symmetries of the inner units of known blocks, whatever network they stand in.

Units that are made and used within one block may move, whatever surrounds it: the hidden units of a transformer
layer's MLP, its attention heads, the expanded channels of a MobileNet block. A block counts as known only if it has
the modules of its kind and none whose tensors could belong to the inner units. This module never runs a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sane_ray.tokens.symmetry.axes import Axis, Symmetry
from sane_ray.tokens.symmetry.modules import Modules, is_batch_norm, is_layer


@dataclass(frozen=True)
class _Mlp:
    """Names within a block: layers whose elementwise functions (or products) one layer reads, and what tells the kind.

    Nothing with an axis as long as the hidden layer may stand beside them.
    """

    inputs: tuple[str, ...]
    output: str
    beside: tuple[str, ...]


_MLPS = (
    _Mlp(("linear1",), "linear2", ("self_attn.out_proj", "norm1", "norm2")),  # torch.nn.TransformerEncoderLayer
    _Mlp(("intermediate.dense",), "output.dense", ("attention.output.dense",)),  # BERT, ViT
    _Mlp(("ffn.lin1",), "ffn.lin2", ("attention.q_lin",)),  # DistilBERT
    _Mlp(("fc1",), "fc2", ("self_attn.out_proj", "final_layer_norm")),  # OPT, BART
    _Mlp(("mlp.fc1",), "mlp.fc2", ("self_attn.out_proj", "layer_norm1")),  # CLIP
    _Mlp(("mlp.fc1",), "mlp.fc2", ("attn.qkv", "norm1")),  # timm's ViT
    _Mlp(("mlp.0",), "mlp.3", ("self_attention.out_proj", "ln_1")),  # torchvision's ViT
    _Mlp(("mlp.c_fc",), "mlp.c_proj", ("attn.c_attn", "ln_1")),  # GPT-2, also with linear layers
    _Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("self_attn.o_proj", "input_layernorm")),  # LLaMA
)


@dataclass(frozen=True)
class _Attention:
    """Names within a block: the module that holds the projections, and they; the output may stand elsewhere."""

    holder: str
    query: str
    key: str
    value: str
    output: str
    beside: str


_ATTENTIONS = (
    _Attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj", "input_layernorm"),  # LLaMA
    _Attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj", "self_attn_layer_norm"),  # OPT, BART
    _Attention("encoder_attn", "q_proj", "k_proj", "v_proj", "encoder_attn.out_proj", "encoder_attn_layer_norm"),
    _Attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj", "layer_norm1"),  # CLIP
    _Attention("attention.self", "query", "key", "value", "attention.output.dense", "intermediate.dense"),  # BERT
    _Attention("attention.attention", "query", "key", "value", "attention.output.dense", "intermediate.dense"),  # ViT
    _Attention("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin", "sa_layer_norm"),  # DistilBERT
)


@dataclass(frozen=True)
class _PackedAttention:
    """Names within a block: a projection whose outputs are queries, keys, values, each cut into heads."""

    holder: str
    weight: str
    bias: str
    output: str
    beside: str


_PACKED = (
    _PackedAttention("self_attn", ".in_proj_weight", ".in_proj_bias", "self_attn.out_proj", "norm1"),  # torch.nn
    _PackedAttention("self_attention", ".in_proj_weight", ".in_proj_bias", "self_attention.out_proj", "ln_1"),
    _PackedAttention("attn", ".qkv.weight", ".qkv.bias", "attn.proj", "mlp.fc1"),  # timm's ViT
    _PackedAttention("attn", ".c_attn.weight", ".c_attn.bias", "attn.c_proj", "ln_1"),  # GPT-2
)

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "nhead")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim")


class _Found:
    """The axes and sizes found so far."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.sizes: dict[str, int] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, () if there is none."""
        module, _, name = key.rpartition(".")
        return self.modules.get(module, {}).get(name, ())

    def name(self, key: str, axis: int, names: Axis) -> None:
        """Gives an axis of a tensor its permutations; tensors that do not exist are passed over."""
        rank = len(self.shape(key))
        if rank:
            axes = [*self.axes.get(key, (None,) * rank)]
            axes[axis] = names
            self.axes[key] = tuple(axes)

    def outputs(self, module: str, axis: int, names: Axis) -> None:
        """The same for the outputs of a layer, with its bias."""
        self.name(f"{module}.weight", axis, names)
        self.name(f"{module}.bias", 0, names)


def inner_symmetry(modules: Modules, hints: Mapping[str, object]) -> Symmetry:
    """The permutations of inner units of all blocks that are known.

    Args:
        modules: The modules of an architecture.
        hints: What a config says: heads move only where it tells how many there are.
    """
    found = _Found(modules)
    for mlp in _MLPS:
        for block in _blocks(modules, mlp.output, (*mlp.inputs, *mlp.beside)):
            _permute_hidden(found, block, mlp)
    for block in _blocks(modules, "conv.1.0", ("conv.0.0", "conv.0.1", "conv.1.1", "conv.2", "conv.3")):
        _permute_expanded(found, block)
    heads, shared = _heads(hints)
    if heads:
        width = next((value for name in _WIDTHS if isinstance(value := hints.get(name), int)), None)
        for split in _ATTENTIONS:
            for block in _blocks(modules, split.output, (split.beside,)):
                _permute_split_heads(found, block, split, heads, shared or heads, width)
        for packed in _PACKED:
            for block in _blocks(modules, packed.output, (packed.beside,)):
                if shared in (None, heads):
                    _permute_packed_heads(found, block, packed, heads, width)
    return Symmetry(found.axes, found.sizes)


def _blocks(modules: Modules, last: str, others: tuple[str, ...]) -> Iterator[str]:
    """Prefixes, with their dot, under which all these modules stand."""
    for module in modules:
        block = module.removesuffix(last)
        if (
            (block == "" or block.endswith("."))
            and module == block + last
            and all(block + o in modules for o in others)
        ):
            yield block


def _permute_hidden(found: _Found, block: str, mlp: _Mlp) -> None:
    """The hidden units, if it is certain which axes they are."""
    modules = found.modules
    named = [block + name for name in (*mlp.inputs, mlp.output)]
    if not all({"weight"} <= modules[module].keys() <= {"weight", "bias"} for module in named):
        return
    if any(len(modules[module]["weight"]) != 2 for module in named):
        return
    rows, columns = modules[named[-1]]["weight"]
    first = modules[named[0]]["weight"]
    if rows == columns or any(modules[module]["weight"] != first for module in named[:-1]) or first != (columns, rows):
        return
    width = _norm_width(found, block, mlp)
    if width not in (rows, columns):
        return
    hidden = rows if width == columns else columns
    transposed = hidden == rows  # GPT-2 keeps its weights as [inputs, outputs]
    if transposed and mlp.inputs != ("mlp.c_fc",):
        return
    biases = [modules[module].get("bias", ()) for module in named]
    if any(bias not in ((), (hidden,)) for bias in biases[:-1]) or biases[-1] not in ((), (width,)):
        return
    containers = {name.rpartition(".")[0] for name in (*mlp.inputs, mlp.output) if "." in name}
    for module, tensors in modules.items():
        if not module.startswith(block) or module in named:
            continue
        inside = "mlp" in containers and module.startswith(f"{block}mlp.")
        if inside or any(hidden in shape for name, shape in tensors.items() if not _is_attention(module, block, name)):
            return
    name = named[0]
    found.sizes[name] = hidden
    for module in named[:-1]:
        found.outputs(module, int(transposed), name)
    found.name(f"{named[-1]}.weight", int(not transposed), name)


def _is_attention(module: str, block: str, name: str) -> bool:
    """Whether a tensor is a known projection of queries, keys and values, which may be as wide as a hidden layer."""
    inner = f"{module}.{name}".removeprefix(block)
    return (
        re.fullmatch(r"(self_attn|self_attention|attn|attention)\.(in_proj|qkv|c_attn|[qkvo]_proj)[._]\w+", inner)
        is not None
    )


def _norm_width(found: _Found, block: str, mlp: _Mlp) -> int:
    """Width of the residual stream, as a norm or the output's bias shows it; 0 if nothing does."""
    for other in mlp.beside:
        shape = found.shape(f"{block}{other}.weight")
        if len(shape) == 1:
            return shape[0]
    for other in mlp.beside:
        shape = found.shape(f"{block}{other}.weight")
        if len(shape) == 2:
            return shape[0]
    return 0


def _permute_expanded(found: _Found, block: str) -> None:
    """MobileNet: expansion, a convolution of each channel by itself, projection; each with a batch norm."""
    expand, depthwise, project = (found.shape(f"{block}conv.{place}.weight") for place in ("0.0", "1.0", "2"))
    if len(expand) != 4 or len(depthwise) != 4 or len(project) != 4 or expand[2:] != (1, 1) or project[2:] != (1, 1):
        return
    hidden = expand[0]
    norms = [found.modules[f"{block}conv.{place}"] for place in ("0.1", "1.1", "3")]
    lengths = [norm.get("running_mean") for norm in norms]
    inside = [module for module in found.modules if module.startswith(f"{block}conv.")]
    if not all(map(is_batch_norm, norms)) or lengths != [(hidden,), (hidden,), project[:1]] or len(inside) != 6:
        return
    if depthwise[:2] != (hidden, 1) or project[1] != hidden:
        return
    name = f"{block}conv.0.0"
    found.sizes[name] = hidden
    for place in ("0.0", "1.0"):
        found.outputs(f"{block}conv.{place}", 0, name)
    for place in ("0.1", "1.1"):
        for tensor in found.modules[f"{block}conv.{place}"]:
            found.name(f"{block}conv.{place}.{tensor}", 0, name)
    found.name(f"{block}conv.2.weight", 1, name)


def _heads(hints: Mapping[str, object]) -> tuple[int | None, int | None]:
    """Numbers of query heads and of key-value heads; None where unknown, or where heads are not alike (ALiBi)."""
    if any("alibi" in f"{name}={value}".lower() and value for name, value in hints.items()):
        return None, None
    heads = next((value for name in _HEADS if isinstance(value := hints.get(name), int) and value > 1), None)
    shared = hints.get("num_key_value_heads")
    return heads, shared if isinstance(shared, int) and shared > 0 else None


def _only_projections(found: _Found, holder: str, known: set[str], head: int) -> bool:
    """Whether a module holds nothing but projections, norms of one head's entries, and buffers that know no heads."""
    for module, tensors in found.modules.items():
        inner = module.removeprefix(holder).lstrip(".")
        if (module != holder and not module.startswith(f"{holder}.")) or inner in known or inner == "rotary_emb":
            continue
        for name, shape in tensors.items():
            norm = inner in ("q_norm", "k_norm") and shape == (head,)
            mask = not inner and name == "bias" and len(shape) == 4 and shape[:2] == (1, 1)
            if not norm and not mask and f"{inner}.{name}" not in known:
                return False
    return True


def _permute_split_heads(
    found: _Found, block: str, spec: _Attention, heads: int, shared: int, width: int | None
) -> None:
    """Heads of separate projections; query heads that share keys and values move as one."""
    modules = [f"{block}{spec.holder}.{name}" for name in (spec.query, spec.key, spec.value)]
    output = block + spec.output
    if not all(is_layer(found.modules.get(module, {})) for module in (*modules, output)) or heads % shared:
        return
    (rows, inputs), *others = (found.modules[module]["weight"][:2] for module in modules)
    residual, columns = found.modules[output]["weight"][:2]
    head, rest = divmod(rows, heads)
    fits = not rest and columns == rows and all(other[0] == shared * head for other in others)
    if not fits or residual != inputs or width not in (None, residual) or shared < 2:
        return
    known = {spec.query, spec.key, spec.value, spec.output.removeprefix(f"{spec.holder}.")}
    if not _only_projections(found, f"{block}{spec.holder}", known, head):
        return
    name = f"{block}{spec.holder}"
    found.sizes[name] = shared
    for module in modules:
        found.outputs(module, 0, name)
    found.name(f"{output}.weight", 1, name)


def _permute_packed_heads(found: _Found, block: str, spec: _PackedAttention, heads: int, width: int | None) -> None:
    """Heads of one projection of queries, keys and values, one after the other."""
    holder, output = block + spec.holder, block + spec.output
    packed, bias = found.shape(holder + spec.weight), found.shape(holder + spec.bias)
    if len(packed) != 2 or not is_layer(found.modules[output]):
        return
    residual = min(packed)
    head, rest = divmod(residual, heads)
    square = found.modules[output]["weight"] == (residual, residual)
    if max(packed) != 3 * residual or rest or not square or bias not in ((), (3 * residual,)):
        return
    transposed = packed[1] == 3 * residual
    if width not in (None, residual) or (transposed and spec.weight != ".c_attn.weight"):
        return
    known = {spec.weight, spec.bias, spec.output.removeprefix(f"{spec.holder}.")}
    if spec.weight.endswith(".weight"):
        known.add(spec.weight.removesuffix(".weight").lstrip("."))
    if not _only_projections(found, holder, known, head):
        return
    found.sizes[holder] = heads
    found.name(holder + spec.weight, int(transposed), (holder,) * 3)
    found.name(holder + spec.bias, 0, (holder,) * 3)
    found.name(f"{output}.weight", int(not transposed), holder)
