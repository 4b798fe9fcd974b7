"""Which tensors of a state dict become tokens, what each of them is, and which bias belongs to which weight.

A tensor is known by its name, its shape, its dtype and its neighbours, for there is nothing else in a state dict; the
names are those of torch, timm and Hugging Face. A kind is a description and nothing depends on it but the discovery of
the token size, so a wrong one does no harm. This module never looks at values and never imports Ray.

In this order:

* ``running_mean``, ``running_var``: by name.
* ``weight_norm``: the magnitudes of weight normalisation, ``weight_g`` or ``parametrizations.weight.original0``. The
  directions, ``weight_v`` or ``original1``, are the weight that they stand for, with its bias.
* ``recurrent``: ``weight_ih_l0``, ``weight_hh_l0_reverse``, ``weight_hr_l0`` with ``bias_ih_l0`` and so on.
* ``position``: a word such as position, rotary or relative in the name, or in the module's name where that is a table
  (two axes, no bias); also buffers such as rotary frequencies.
* ``bias``: bias in the name, if no weight takes it as a column (for want of a weight, or of one value a channel).
* ``norm``: a weight of one axis and more than one value, or with a bias of its own shape, or of a batch norm; ``gamma``
  beside ``beta``.
* ``attention``: ``in_proj_weight`` and the like, or a weight of two axes below a module named attention.
* ``embedding``: a weight of two axes and no bias in a module named embedding, and class or mask tokens.
* ``linear``: a weight of two axes; three where the experts of a mixture are stacked.
* ``conv_transpose``: a weight of three or more axes whose bias has the length of another axis than the first, or
  whose module says so. Its rows are its inputs, so the bias is a layer by itself.
* ``conv``: every other weight of three or more axes.
* ``other``: the rest, such as layer scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.layers import Kind, Layer

BatchNorm = Literal["keep", "ignore"]
Parameters = Literal["all", "weights"]
StateDict = Mapping[str, Tensor]

_RUNNING = ("running_mean", "running_var")
_POSITION = {"pos", "position", "positions", "positional", "relative", "rel", "rotary", "rope", "freq", "freqs", "wpe"}
_ATTENTION = {"attn", "attention", "mha"}
_PROJECTION = re.compile(r"(to_|w)?(q|k|v|o|qkv|query|key|value|query_key_value)(_?proj)?", re.IGNORECASE)
_EMBEDDING = {"embed", "embedding", "embeddings", "emb", "wte", "token", "tokens"}
_TRANSPOSED = {"transpose", "transposed", "deconv"}
_SCALES = ("scale", "scales", "SCB", "qzeros", "weight_scale", "weight_scales", "weight_scale_inv")
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)
"""Two values a byte: called floating point by torch, which cannot convert it."""


def find_layers(state_dict: StateDict, batch_norm: BatchNorm, parameters: Parameters) -> list[Layer]:
    """Every tensor that becomes tokens with its bias, in the order of the state dict, not yet laid out in tokens.

    Raises:
        InputError: There is none, or a weight is quantised.
    """
    _refuse_quantised(state_dict)
    keys = [key for key in state_dict if not _is_left_out(state_dict, key, batch_norm)]
    biases = _biases(state_dict, keys)
    columns = set(biases.values())
    layers = [
        _layer(state_dict, key, biases.get(key))
        for key in keys
        if key not in columns and (parameters == "all" or _is_published(key))
    ]
    if not layers:
        raise InputError(
            f"none of the {len(state_dict)} entries of the state dict can become tokens: it needs floating-point "
            f"tensors{' named weight' if parameters == 'weights' else ''}; found "
            f"{', '.join(list(state_dict)[:5]) or 'nothing'}"
        )
    return layers


def reason(state_dict: StateDict, key: str, batch_norm: BatchNorm) -> str:
    """Why an entry that did not become tokens did not."""
    unusable = _unusable(state_dict[key])
    if unusable is not None:
        return unusable
    if batch_norm == "ignore" and _is_batch_norm(state_dict, key):
        return "batch norm is ignored"
    if "bias" in _words(key.rpartition(".")[2]):
        return "bias without a weight beside it that has a channel for each of its values"
    return f"named {key.rpartition('.')[2]}, and only weights, their biases and running statistics are taken"


def _layer(state_dict: StateDict, key: str, bias_key: str | None) -> Layer:
    tensor = state_dict[key]
    shape = tuple(tensor.shape)
    channels = shape[0] if shape else 1
    width = tensor.numel() // channels + (bias_key is not None)
    return Layer(key, shape, _kind(state_dict, key), bias_key, channels, width, num_tokens=0)


def _kind(state_dict: StateDict, key: str) -> Kind:
    """What a tensor is; the module's docstring has the rules."""
    module, name = _parameter(key)
    if name in _RUNNING:
        return name  # type: ignore[return-value]
    if _is_magnitude(state_dict, key):
        return "weight_norm"
    if re.match(r"weight_(ih|hh|hr)($|_)", name):
        return "recurrent"
    axes, is_weight = state_dict[key].dim(), _is_weight(state_dict, key)
    is_table = is_weight and axes == 2 and _neighbour(state_dict, key, "bias") is None
    own_words = _words(name) | (_words(module.rpartition(".")[2]) if is_table else set())
    if own_words & _POSITION:
        return "position"
    if "bias" in _words(name) or (name == "beta" and _neighbour(state_dict, key, "gamma") is not None):
        return "bias"
    if _is_norm(state_dict, key, is_weight):
        return "norm"
    if axes == 3 and _words(key) & {"expert", "experts"}:
        return "linear"
    if is_weight and axes >= 2:
        return _kind_of_weight(state_dict, key, is_table)
    return "embedding" if own_words & _EMBEDDING else "other"


def _kind_of_weight(state_dict: StateDict, key: str, is_table: bool) -> Kind:
    module, name = _parameter(key)
    if state_dict[key].dim() > 2:
        return "conv_transpose" if _is_transposed(state_dict, key) else "conv"
    above = module.split(".")[-3:]
    if name.endswith("proj_weight") or _words(".".join(above)) & _ATTENTION or _PROJECTION.fullmatch(above[-1]):
        return "attention"
    return "embedding" if is_table and _words(above[-1]) & _EMBEDDING else "linear"


def _biases(state_dict: StateDict, keys: Iterable[str]) -> dict[str, str]:
    """The bias of each weight that has one; no bias belongs to two weights."""
    free, biases = set(keys), {}
    for key in keys:
        bias_key = _bias_of(state_dict, key)
        if bias_key in free:
            biases[key] = bias_key
            free.remove(bias_key)
    return biases


def _bias_of(state_dict: StateDict, key: str) -> str | None:
    """The bias that is a column of a weight: beside it, of one value a channel."""
    if not _is_weight(state_dict, key) or _is_transposed(state_dict, key):
        return None
    name = _parameter(key)[1]
    bias_name = "bias" if name in ("weight", "weight_v", "weight_orig") else name.replace("weight", "bias")
    bias = _neighbour(state_dict, key, bias_name)
    fits = bias is not None and bias.shape == state_dict[key].shape[:1]
    return _sibling(key, bias_name) if fits else None


def _is_weight(state_dict: StateDict, key: str) -> bool:
    """Whether a tensor is the weight of its module, and not something about it (a magnitude, a mask)."""
    name = _parameter(key)[1]
    if name == "weight_v":
        return _neighbour(state_dict, key, "weight_g") is not None
    named = name in ("weight", "weight_orig") or re.match(r"weight_(ih|hh|hr)($|_)|\w*proj_weight$", name) is not None
    return named and not _is_magnitude(state_dict, key)


def _is_magnitude(state_dict: StateDict, key: str) -> bool:
    """Whether a tensor holds the magnitudes of weight normalisation."""
    parametrized = key.endswith(".original0") and f"{key[:-1]}1" in state_dict
    return parametrized or (key.endswith("weight_g") and _neighbour(state_dict, key, "weight_v") is not None)


def _is_norm(state_dict: StateDict, key: str, is_weight: bool) -> bool:
    tensor = state_dict[key]
    if not is_weight:
        return _parameter(key)[1] == "gamma" and _neighbour(state_dict, key, "beta") is not None
    if tensor.dim() == 1:
        return tensor.numel() > 1 or _is_batch_norm(state_dict, key)
    bias = _neighbour(state_dict, key, "bias")
    return bias is not None and bias.shape == tensor.shape and tensor.dim() > 0


def _is_batch_norm(state_dict: StateDict, key: str) -> bool:
    """Whether the module of ``key`` keeps both running statistics, of the shape that the tensor has."""
    shape = state_dict[key].shape
    statistics = (_neighbour(state_dict, key, name) for name in _RUNNING)
    return all(value is not None and value.shape == shape for value in statistics)


def _is_transposed(state_dict: StateDict, key: str) -> bool:
    """Whether a weight is that of a transposed convolution: [inputs, outputs / groups, ...]."""
    shape = state_dict[key].shape
    if len(shape) < 3:
        return False
    bias = _neighbour(state_dict, key, "bias")
    by_shape = bias is not None and bias.dim() == 1 and len(bias) != shape[0] and len(bias) % shape[1] == 0
    return by_shape or bool(_words(_parameter(key)[0].rpartition(".")[2]) & _TRANSPOSED)


def _is_published(key: str) -> bool:
    """Whether the published code tokenises a tensor by itself; unlike there, names of modules do not count."""
    name = _parameter(key)[1]
    return "weight" in name or name in _RUNNING


def _is_left_out(state_dict: StateDict, key: str, batch_norm: BatchNorm) -> bool:
    return _unusable(state_dict[key]) is not None or (batch_norm == "ignore" and _is_batch_norm(state_dict, key))


def _unusable(value: object) -> str | None:
    """Why a value can never become tokens, or None if it can."""
    if not isinstance(value, Tensor):
        return "not a tensor"
    if value.is_quantized or value.dtype == _PACKED:
        return f"{value.dtype} is quantised"
    if not value.is_floating_point():
        return f"{value.dtype} is not floating point"
    if value.layout != torch.strided:
        return f"{value.layout} is not dense"
    return "holds no values" if value.numel() == 0 else None


def _refuse_quantised(state_dict: StateDict) -> None:
    """Raises ``InputError`` for the first weight that is quantised: without it the rest is not the model."""
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and _is_quantised(state_dict, key, value):
            raise InputError(
                f"{key} is {value.dtype}, a quantised weight: dequantise it first, for the floating-point tensors "
                "beside it are not the model"
            )


def _is_quantised(state_dict: StateDict, key: str, value: Tensor) -> bool:
    module, name = _parameter(key)
    named = name == "weight" or "qweight" in name or name == "weight_packed"
    if value.is_quantized or value.dtype == _PACKED:
        return named
    if value.dtype not in (torch.int8, torch.uint8):
        return value.dtype in (torch.int16, torch.int32, torch.int64) and "qweight" in name
    dot = "." if module else ""
    scales: Iterable[str] = (f"{name}_scale", f"{name}_scale_inv", f"{name}.absmax", *_SCALES)
    return named or any(f"{module}{dot}{scale}" in state_dict for scale in scales)


def _parameter(key: str) -> tuple[str, str]:
    """The module and the name of a parameter: ``a`` and ``weight`` also for ``a.parametrizations.weight.original0``."""
    parts = key.split(".")
    if len(parts) >= 3 and parts[-3] == "parametrizations" and re.fullmatch(r"original\d*", parts[-1]):
        return ".".join(parts[:-3]), parts[-2]
    return ".".join(parts[:-1]), parts[-1]


def _neighbour(state_dict: StateDict, key: str, name: str) -> Tensor | None:
    """A usable tensor of the same module."""
    value = state_dict.get(_sibling(key, name))
    return None if _unusable(value) is not None else value


def _sibling(key: str, name: str) -> str:
    """Another entry of the same module."""
    module = _parameter(key)[0]
    return f"{module}.{name}" if module else name


def _words(name: str) -> set[str]:
    """The words of a name, in lower case: ``SelfAttention.embed_2`` has self, attention and embed."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
