"""Turns a state dict into a sequence of tokens and back, by an explicit table of layers.

A layer's weight is read as one row a channel, ``[w | b]`` with the bias as its last column. ``sparse``: a row is padded
with zeros to a multiple of the token size and cut into tokens (SANE, arXiv 2406.09997, section 3.1); ``dense``: the
rows follow each other and only the end of the layer is padded. What cannot become tokens is listed in the table with
the reason. This module never reads a file, never normalises, and never imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size, C channels of a layer, S distance between its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.kinds import BatchNorm, Parameters, find_layers, reason
from sane_ray.tokens.layers import Kind, Layer, LayerTable, Layout, Untokenized

__all__ = [
    "Kind",
    "Layer",
    "LayerTable",
    "Layout",
    "Untokenized",
    "build_layer_table",
    "check_fits",
    "detokenize",
    "discover_token_size",
    "tokenize",
    "tokenize_range",
]

Read = Callable[[str, int, int], Tensor]


def discover_token_size(
    state_dict: Mapping[str, Tensor], batch_norm: BatchNorm = "keep", parameters: Parameters = "all"
) -> int:
    """The width of the widest channel, bias included, so that each channel is one token.

    The published code looks only at layers with a bias (513 instead of 4608 for a ResNet-18); this looks at all that
    have channels (``LayerTable.widest_channel``).

    Raises:
        InputError: As ``build_layer_table``.
    """
    return build_layer_table(state_dict, batch_norm=batch_norm, parameters=parameters).token_size


def build_layer_table(
    state_dict: Mapping[str, Tensor],
    *,
    token_size: int = 0,
    batch_norm: BatchNorm = "keep",
    layout: Layout = "sparse",
    parameters: Parameters = "all",
) -> LayerTable:
    """Reads off a state dict how checkpoints of its architecture become tokens; only names, shapes and dtypes count.

    A bias with one value a channel is a column of its weight; everything else is a layer by itself, in the order of the
    state dict. ``sane_ray.tokens.kinds`` has the rules.

    Args:
        state_dict: Any checkpoint of the architecture, in the order the tokens shall have; meta tensors will do.
        token_size: Values of a token; 0 takes the widest channel.
        batch_norm: ``ignore`` leaves out the weights, biases and running statistics of batch norms.
        layout: ``sparse`` pads each row to whole tokens, as published; ``dense`` only the end of a layer; ``mixed`` is
            dense for a layer whose sparse tokens would be more than a quarter padding, and sparse for the others.
        parameters: ``all`` tokenises every floating-point tensor, buffers such as rotary frequencies included;
            ``weights`` those that the published code does: tensors named weight, their biases, running statistics.

    Raises:
        InputError: A negative token size, a quantised weight, or nothing in the state dict can become tokens.
    """
    if token_size < 0:
        raise InputError(f"token_size is {token_size}: it must be positive, or 0 to take the widest channel")
    layers = find_layers(state_dict, batch_norm, parameters)
    taken = {layer.key for layer in layers} | {layer.bias_key for layer in layers}
    untokenized = tuple(
        Untokenized(key, tuple(getattr(value, "shape", ())), reason(state_dict, key, batch_norm))
        for key, value in state_dict.items()
        if key not in taken
    )
    table = LayerTable(1, tuple(layers), untokenized, layout)
    return table.resized(token_size or table.widest_channel)


@torch.no_grad()
def tokenize(state_dict: Mapping[str, Tensor], table: LayerTable, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tokens of a checkpoint.

    Args:
        state_dict: Weights of any floating-point dtype and memory layout.
        table: Layers of the architecture. Entries it lists as untokenised may be missing.
        dtype: Of the tokens. float32 holds every narrower dtype exactly and rounds float64.

    Returns:
        [N, T] on the device of the first layer, zero where there is padding.

    Raises:
        InputError: A key is missing, unknown, of another shape, or not floating point.
    """
    check_fits(state_dict, table)
    device = state_dict[table.layers[0].key].device
    tokens_NT = torch.empty(table.num_tokens, table.token_size, dtype=dtype, device=device)

    def read(key: str, start: int, stop: int) -> Tensor:
        return state_dict[key].reshape(-1)[start:stop]

    _fill(tokens_NT, read, table, 0, table.num_tokens)
    return tokens_NT


@torch.no_grad()
def tokenize_range(read: Read, table: LayerTable, start: int, stop: int, out: Tensor | None = None) -> Tensor:
    """Some tokens of a checkpoint, without reading the rest of it.

    Args:
        read: Gives values ``start`` to ``stop`` of a tensor, flat in row-major order: ``Checkpoint.read``. It is asked
            for no more values at once than the range holds.
        table: Layers of the architecture.
        start: First token of the range.
        stop: End of the range.
        out: Contiguous [stop - start, T] to write to; memory that is used again and again is several times as fast.

    Returns:
        float32 [stop - start, T], the same as that slice of ``tokenize``; ``out`` where it is given.

    Raises:
        InputError: The model has no such range, or a tensor is not what the table says.
    """
    tokens_NT = torch.empty(max(stop - start, 0), table.token_size) if out is None else out
    _fill(tokens_NT, read, table, start, stop)
    return tokens_NT


def detokenize(
    tokens_NT: Tensor, table: LayerTable, reference: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of a token sequence: the exact inverse of ``tokenize``, differentiable in the tokens.

    Args:
        tokens_NT: Tokens [N, T]; what stands in the padding is ignored.
        table: Layers of the architecture.
        reference: A checkpoint of the same architecture that gives the order of the keys, the dtypes, and copies of
            everything that is not tokenised. Without it those keys are left out and the dtype is that of the tokens.

    Returns:
        Tensors that share no memory with the tokens or the reference.

    Raises:
        InputError: The tokens or the reference do not fit the table.
    """
    if tuple(tokens_NT.shape) != (table.num_tokens, table.token_size):
        raise InputError(
            f"tokens have shape {tuple(tokens_NT.shape)}, but the architecture has {table.num_tokens} tokens of size "
            f"{table.token_size}: use the layer table they were made with"
        )
    weights: dict[str, Tensor] = {}
    parts = tokens_NT.split([layer.num_tokens for layer in table.layers])
    for layer, part in zip(table.layers, parts, strict=True):
        stride = layer.stride(table.token_size)
        rows_CS = part.reshape(-1)[: layer.channels * stride].view(layer.channels, stride)
        weights[layer.key] = rows_CS[:, : layer.fan_in].clone(memory_format=torch.contiguous_format).view(layer.shape)
        if layer.bias_key is not None:
            biases_C = rows_CS[:, layer.fan_in].clone(memory_format=torch.contiguous_format)
            weights[layer.bias_key] = biases_C.view(layer.shape[:1])
    if reference is None:
        return weights
    check_fits(reference, table)
    return {key: weights[key].to(value.dtype) if key in weights else _copy(value) for key, value in reference.items()}


def _fill(tokens_NT: Tensor, read: Read, table: LayerTable, start: int, stop: int) -> None:
    """Writes a range of tokens of a checkpoint, padding included."""
    done = 0
    for index, first, end in table.slices(start, stop):
        layer, part = table.layers[index], tokens_NT[done : done + end - first].view(-1)
        _fill_layer(part, read, layer, layer.stride(table.token_size), first * table.token_size)
        done += end - first


def _fill_layer(out: Tensor, read: Read, layer: Layer, stride: int, offset: int) -> None:
    """Writes ``len(out)`` values of a layer's row space from ``offset``: a partial row, whole rows, a partial row."""
    if stride == layer.fan_in:  # rows without bias and padding: one run of values
        count = min(len(out), layer.channels * stride - offset)
        out[:count] = _values(read, layer.key, offset, offset + count)
        out[count:] = 0
        return
    row, column = divmod(offset, stride)
    if column:
        count = min(stride - column, len(out))
        _fill_row(out[:count], read, layer, row, column)
        out, row = out[count:], row + 1
    rows = min(len(out) // stride, layer.channels - row)
    if rows > 0:
        _fill_rows(out[: rows * stride].view(rows, stride), read, layer, row)
        out, row = out[rows * stride :], row + rows
    if len(out) and row < layer.channels:
        _fill_row(out, read, layer, row, 0)
    else:
        out.zero_()  # behind the last row of a dense layer


def _fill_rows(rows_CS: Tensor, read: Read, layer: Layer, row: int) -> None:
    """Writes whole rows of a layer from ``row``."""
    rows = len(rows_CS)
    weights = _values(read, layer.key, row * layer.fan_in, (row + rows) * layer.fan_in)
    rows_CS[:, : layer.fan_in].copy_(weights.view(rows, -1))
    if layer.bias_key is not None:
        rows_CS[:, layer.fan_in].copy_(_values(read, layer.bias_key, row, row + rows))
    if layer.width < rows_CS.shape[1]:
        rows_CS[:, layer.width :].zero_()


def _fill_row(out: Tensor, read: Read, layer: Layer, row: int, column: int) -> None:
    """Writes ``len(out)`` values of one row of a layer from ``column``."""
    count = max(min(len(out), layer.fan_in - column), 0)
    if count:
        start = row * layer.fan_in + column
        out[:count] = _values(read, layer.key, start, start + count)
    if layer.bias_key is not None and column <= layer.fan_in < column + len(out):
        out[count : count + 1] = _values(read, layer.bias_key, row, row + 1)
        count += 1
    out[count:] = 0


def _values(read: Read, key: str, start: int, stop: int) -> Tensor:
    values = read(key, start, stop)
    if values.numel() != stop - start:
        raise InputError(
            f"{key} gave {values.numel()} of its values {start} to {stop}: the checkpoint is shorter than its "
            "header says, so copy it again"
        )
    if not values.is_floating_point():
        raise InputError(f"{key} is {values.dtype}: only floating-point weights become tokens, so dequantise it first")
    return values


def check_fits(state_dict: Mapping[str, Tensor], table: LayerTable) -> None:
    """Raises ``InputError`` naming the first key that does not fit; meta tensors will do."""
    for layer in table.layers:
        _check_tensor(state_dict, layer.key, layer.shape)
        if layer.bias_key is not None:
            _check_tensor(state_dict, layer.bias_key, layer.shape[:1])
    if not state_dict.keys() <= table._keys:
        unknown = next(key for key in state_dict if key not in table._keys)
        raise InputError(
            f"state dict has {unknown}, which the layer table does not name: it is of another architecture"
        )


def _check_tensor(state_dict: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
    tensor = state_dict.get(key)
    if tensor is None:
        raise InputError(f"state dict lacks {key}, which the layer table names: it is of another architecture")
    if tensor.shape != shape:
        raise InputError(
            f"{key} has shape {tuple(tensor.shape)}, but the layer table says {shape}: it is of another architecture"
        )
    if not tensor.is_floating_point():
        raise InputError(f"{key} is {tensor.dtype}: only floating-point weights become tokens, so dequantise it first")


def _copy(value: Tensor) -> Tensor:
    return value.clone() if isinstance(value, Tensor) else value
