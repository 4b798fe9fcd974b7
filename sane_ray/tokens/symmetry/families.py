"""Symmetries of known families of networks, read off the keys and shapes of a layer table alone.

What is not recognised gets the trivial symmetry: a wrong permutation would silently destroy a model, a missing one
costs nothing but data augmentation. This module never runs a network and never imports Ray.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sane_ray.tokens.symmetry.axes import Axis, Symmetry
from sane_ray.tokens.symmetry.blocks import inner_symmetry
from sane_ray.tokens.symmetry.modules import Modules, Tensors, is_batch_norm, is_layer, modules_of
from sane_ray.tokens.tokenizer import LayerTable


def derive_symmetry(table: LayerTable, hints: Mapping[str, object] | None = None) -> Symmetry:
    """The symmetry of a network of a known family, otherwise the trivial one.

    Known as a whole are:

    * Chains: all modules are convolutions, linear layers and batch norms numbered under one prefix (``0``,
      ``module_list.3``, ``net.layers.1``), each reading the output of the one before, with elementwise functions,
      pooling and a channel-first flatten between them. Where another module has one value a channel (layer norm, group
      norm, PReLU), the channels around it stay fixed. So do VGGs: ``features.{n}``, then ``classifier.{n}`` or
      ``classifier``.
    * ResNets of basic or bottleneck blocks, wide or with grouped convolutions (whose groups move as blocks):
      ``conv1, bn1, layer{k}.{j}.{conv,bn}{n}``, shortcuts ``downsample`` or ``shortcut`` of a convolution and a batch
      norm, and ``fc`` or ``linear``. A residual stream has one permutation until a shortcut with weights begins a new
      one.
    * Wide ResNets with norms before convolutions: ``block{k}.layer.{j}.{bn1,conv1,bn2,conv2,convShortcut}``.

    Of other networks the inner units of known blocks move, see ``blocks``: the hidden units of transformer layers,
    their attention heads where ``hints`` tell how many there are, and the expanded channels of MobileNet blocks.

    The channels of the input and the outputs of the last layer are always fixed. What has no trace in keys and shapes
    cannot be seen: a function that treats channels unlike without having weights, a skip connection in a chain, or
    that a convolution is transposed if it has as many inputs as outputs. ``sane_ray.tokens.tracing`` sees them.

    Args:
        table: Its tokenised and untokenised entries are both looked at, so batch norms are permuted even if they are
            not tokenised.
        hints: What a config file says of the model: ``num_attention_heads`` (or ``n_head``, ``num_heads``, ``nhead``),
            ``num_key_value_heads``, ``hidden_size`` (or ``n_embd``, ``d_model``). Others are ignored.
    """
    modules = modules_of(table)
    for family in (_chain, _vgg, _resnet, _pre_activation_resnet):
        try:
            return family(modules)
        except _NotThisFamily:
            continue
    return inner_symmetry(modules, hints or {})


class _NotThisFamily(Exception):
    """The keys and shapes are not those of the family that was tried."""


@dataclass(frozen=True)
class _Stream:
    """Features that flow between modules: their number, the permutation they carry, and whether each may be a map."""

    size: int
    name: str | None
    maps: bool

    def feeds(self, inputs: int, flattened: bool) -> bool:
        """Whether a module of so many inputs can read the stream, in blocks where maps have been flattened."""
        return inputs == self.size or (self.maps and flattened and inputs % self.size == 0)


@dataclass
class _Assembly:
    """Collects the axes of a symmetry while a family walks its modules, each of which must be used."""

    modules: Modules
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def layer(self, module: str, source: _Stream | None, name: str | None) -> _Stream:
        """A convolution or linear layer that reads ``source`` (None: the network's input) and writes ``name``."""
        channels, inputs, *kernel = self._take_layer(module)
        if source is not None and not source.feeds(inputs, flattened=not kernel):
            raise _NotThisFamily
        self._name_layer(module, (name, source.name if source else None, *[None] * len(kernel)))
        if name is not None:
            self.sizes[name] = channels
        return _Stream(channels, name, maps=bool(kernel))

    def grouped(self, module: str, source: _Stream) -> _Stream:
        """A convolution in groups, which move as blocks and take the permutation of what they read with them."""
        channels, inputs, *kernel = self._take_layer(module)
        groups, rest = divmod(source.size, inputs)
        if not kernel or rest or channels % groups or source.name is None:
            raise _NotThisFamily
        self.sizes[source.name] = groups
        self._name_layer(module, (source.name, *[None] * (1 + len(kernel))))
        return _Stream(channels, source.name, maps=True)

    def inputs_of(self, module: str) -> int:
        """Channels that a layer's weight says it reads, of one group."""
        return (*self.modules.get(module, {}).get("weight", ()), 0, 0)[1]

    def norm(self, module: str, stream: _Stream) -> None:
        """A batch norm of a stream."""
        tensors = self._take(module)
        if not is_batch_norm(tensors) or not stream.feeds(tensors["running_mean"][0], flattened=True):
            raise _NotThisFamily
        for tensor in tensors:
            self._name(f"{module}.{tensor}", (stream.name,))

    def skip(self, module: str) -> None:
        """A module whose tensors stay as they are."""
        self._take(module)

    def finish(self) -> Symmetry:
        """The symmetry, if no module was left over."""
        if self.used != self.modules.keys():
            raise _NotThisFamily
        return Symmetry(self.axes, self.sizes)

    def _take_layer(self, module: str) -> tuple[int, ...]:
        tensors = self._take(module)
        if not is_layer(tensors):
            raise _NotThisFamily
        return tensors["weight"]

    def _name_layer(self, module: str, names: tuple[Axis, ...]) -> None:
        self._name(f"{module}.weight", names)
        if "bias" in self.modules[module]:
            self._name(f"{module}.bias", names[:1])

    def _take(self, module: str) -> dict[str, tuple[int, ...]]:
        if module not in self.modules:
            raise _NotThisFamily
        self.used.add(module)
        return self.modules[module]

    def _name(self, key: str, names: tuple[Axis, ...]) -> None:
        if any(names):
            self.axes[key] = names


def _leaves_channels_alone(tensors: Tensors) -> bool:
    """Whether a module between two layers treats all channels alike: a batch norm, or single values for all."""
    return is_batch_norm(tensors) or all(math.prod(shape) == 1 for shape in tensors.values())


def _chain(modules: Modules) -> Symmetry:
    """Modules numbered under one prefix, each reading the one before."""
    paths = [re.fullmatch(r"(|.+\.)(\d+)", module) for module in modules]
    if not all(paths) or len({path[1] for path in paths if path}) != 1:
        raise _NotThisFamily
    return _in_order(modules, sorted(modules, key=lambda module: int(module.rpartition(".")[2])))


def _vgg(modules: Modules) -> Symmetry:
    """Numbered convolutions and norms under ``features``, then linear layers under ``classifier``."""
    paths = {module: re.fullmatch(r"(|.+\.)(features|classifier)(?:\.(\d+))?", module) for module in modules}
    found = {module: (path[1], path[2], int(path[3] or 0)) for module, path in paths.items() if path}
    features = [module for module in found if found[module][1] == "features"]
    heads = [module for module in found if found[module][1] == "classifier"]
    plain = all(is_layer(modules[module]) or is_batch_norm(modules[module]) for module in modules)
    flat = any(len(modules[module].get("weight", ())) == 2 for module in features)
    deep = any(len(modules[module].get("weight", ())) > 2 for module in heads)
    one_prefix = len({prefix for prefix, _, _ in found.values()}) == 1
    if found.keys() != modules.keys() or not features or not heads or not one_prefix or not plain or flat or deep:
        raise _NotThisFamily
    ordered = [
        *sorted(features, key=lambda module: found[module][2]),
        *sorted(heads, key=lambda module: found[module][2]),
    ]
    return _in_order(modules, ordered)


def _in_order(modules: Modules, ordered: list[str]) -> Symmetry:
    """Modules of which each reads the one before."""
    places = [place for place, module in enumerate(ordered) if is_layer(modules[module])]
    if not places:
        raise _NotThisFamily
    assembly, stream = _Assembly(modules), None
    for module in ordered[: places[0]]:
        assembly.skip(module)
    for place, end in zip(places, [*places[1:], len(ordered)], strict=True):
        layer, between = ordered[place], ordered[place + 1 : end]
        free = place != places[-1] and all(_leaves_channels_alone(modules[module]) for module in between)
        stream = assembly.layer(layer, stream, layer if free else None)
        for module in between:
            if free and is_batch_norm(modules[module]):
                assembly.norm(module, stream)
            else:
                assembly.skip(module)
    return assembly.finish()


def _resnet(modules: Modules) -> Symmetry:
    """A stem, residual blocks in numbered stages, and a linear head, under any prefix."""
    stems = [module for module in modules if module.rpartition(".")[2] == "conv1"]
    prefix = min(stems, key=len, default="").removesuffix("conv1")
    blocks: dict[tuple[int, int], set[str]] = {}
    for module in modules:
        part = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", module.removeprefix(prefix))
        if part:
            blocks.setdefault((int(part[1]), int(part[2])), set()).add(part[3])
    head = next((name for name in ("fc", "linear") if prefix + name in modules), None)
    if not blocks or head is None:
        raise _NotThisFamily
    assembly = _Assembly(modules)
    stream = assembly.layer(f"{prefix}conv1", None, f"{prefix}conv1")
    assembly.norm(f"{prefix}bn1", stream)
    for stage, block in sorted(blocks):
        stream = _residual_block(assembly, f"{prefix}layer{stage}.{block}", blocks[stage, block], stream)
    assembly.layer(prefix + head, stream, None)
    return assembly.finish()


def _residual_block(assembly: _Assembly, block: str, parts: set[str], stream: _Stream) -> _Stream:
    """Two or three convolutions whose sum with the shortcut shares one permutation; the stream after the block."""
    shortcut = next((name for name in ("downsample", "shortcut") if f"{name}.0" in parts), None)
    result = stream
    if shortcut is not None:
        result = assembly.layer(f"{block}.{shortcut}.0", stream, f"{block}.{shortcut}")
        assembly.norm(f"{block}.{shortcut}.1", result)
    depth = 3 if "conv3" in parts else 2
    inner = stream
    for place in range(1, depth + 1):
        conv = f"{block}.conv{place}"
        if depth == 3 and place == 2 and assembly.inputs_of(conv) != inner.size:
            inner = assembly.grouped(conv, inner)
        else:
            inner = assembly.layer(conv, inner, result.name if place == depth else conv)
        assembly.norm(f"{block}.bn{place}", inner)
    if inner.size != result.size:  # a shortcut that pads channels with zeros ties them to their places
        raise _NotThisFamily
    return result


def _pre_activation_resnet(modules: Modules) -> Symmetry:
    """Wide ResNet with norms before convolutions, as in re-basin code; a shortcut reads what the first norm made."""
    blocks: dict[tuple[str, int, int], set[str]] = {}
    for module in modules:
        part = re.fullmatch(r"(|.+\.)block(\d+)\.layer\.(\d+)\.(\w+)", module)
        if part:
            blocks.setdefault((part[1], int(part[2]), int(part[3])), set()).add(part[4])
    if len({prefix for prefix, _, _ in blocks}) != 1:
        raise _NotThisFamily
    prefix = next(iter(blocks))[0]
    assembly = _Assembly(modules)
    stream = assembly.layer(f"{prefix}conv1", None, f"{prefix}conv1")
    for _, stage, place in sorted(blocks):
        block = f"{prefix}block{stage}.layer.{place}"
        assembly.norm(f"{block}.bn1", stream)
        inner = assembly.layer(f"{block}.conv1", stream, f"{block}.conv1")
        assembly.norm(f"{block}.bn2", inner)
        if "convShortcut" in blocks[prefix, stage, place]:
            stream = assembly.layer(f"{block}.convShortcut", stream, f"{block}.convShortcut")
        result = assembly.layer(f"{block}.conv2", inner, stream.name)
        if result.size != stream.size:
            raise _NotThisFamily
    assembly.norm(f"{prefix}bn1", stream)
    assembly.layer(f"{prefix}fc", stream, None)
    return assembly.finish()
