"""Symmetries of known families of networks, read off the keys and shapes of a layer table alone.

What is not certain gets no permutation: a wrong one would silently destroy a model, a missing one costs nothing but
data augmentation. This module never runs a network and never imports Ray.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sane_ray.tokens.symmetry.axes import Axis, Symmetry
from sane_ray.tokens.symmetry.blocks import inner_symmetry
from sane_ray.tokens.symmetry.modules import Modules, Tensors, is_batch_norm, is_layer, modules_of
from sane_ray.tokens.tokenizer import LayerTable

_DIGITS = ("digits_cnn", "digits_cnn_wide", "digits_cnn_deep")
_ZOO_TYPES = frozenset({"CNN", "CNN2", "CNN3", "MLP", "cnn_s", "cnn_l", *_DIGITS})
"""What ``model::type`` of a params.json names that is a chain under ``module_list``: published types and our own."""

_ZOO_CNNS = (
    ((8, 5, 5), (6, 5, 5), (4, 2, 2), (20,)),
    ((16, 3, 3), (32, 3, 3), (15, 3, 3), (20,)),
    ((8, 3, 3), (10, 3, 3), (24,)),
    ((16, 3, 3), (20, 3, 3), (48,)),
    ((8, 3, 3), (10, 3, 3), (10, 3, 3), (24,)),
)
"""Channels and kernels of all layers but the last of the zoos' CNNs, which are known without their params too."""

_VGG_STAGES = ((1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4))
"""Convolutions before each pooling of VGG-11, -13, -16 and -19."""

_ALEXNET = {0: 11, 3: 5, 6: 3, 8: 3, 10: 3}
"""Kernels of AlexNet's convolutions by their numbers."""

_CLASSIFIERS = ([None], [0, 3, 6], [1, 4, 6])
"""Numbers of the linear layers after them; None is a single layer without a number."""


def derive_symmetry(table: LayerTable, hints: Mapping[str, object] | None = None) -> Symmetry:
    """The symmetry of a network as far as its keys and shapes make it certain, otherwise the trivial one.

    Known as a whole are:

    * Chains that a config or their layout names: the CNNs and MLPs of the published zoos and of our builder
      (``module_list.{n}``), the Small CNN Zoo (``layers.{n}``), VGG-11, -13, -16 and -19 with or without batch norms
      and AlexNet, numbered as in torchvision (``features.{n}``, ``classifier.{n}`` or ``classifier``). Each module
      reads the one before, with elementwise functions, pooling and a channel-first flatten between them. Where a module
      has one value a channel and is no batch norm (layer norm, group norm, PReLU), the channels around it stay fixed.
    * ResNets of basic or bottleneck blocks, wide or with grouped convolutions (whose groups move as blocks):
      ``conv1, bn1, layer{k}.{j}.{conv,bn}{n}``, shortcuts ``downsample`` or ``shortcut`` of a convolution and a batch
      norm, and ``fc`` or ``linear`` on pooled maps. A residual stream has one permutation until a shortcut with weights
      begins a new one. Shapes must show that norms follow convolutions.
    * Wide ResNets with norms before convolutions: ``block{k}.layer.{j}.{bn1,conv1,bn2,conv2,convShortcut}``.

    Of other chains, all of whose modules are numbered under one prefix, the units between two linear layers move, if
    all numbers have gaps where functions without weights stand (an ``nn.Sequential``), or if all modules are linear
    layers or batch norms and no two widths are equal, so that there can be neither a skip connection nor a branch. The
    outputs of a first layer without a bias stay: it may be an embedding. All channels of convolutions stay: neither
    keys nor shapes show a channel shuffle, a group norm without weights, a pixel shuffle or another order of axes
    before a flatten, or that a square convolution is transposed.

    Of other networks the inner units of known blocks move, see ``blocks``: the hidden units of transformer layers,
    their attention heads where ``hints`` tell how many there are, and the expanded channels of MobileNet blocks.

    The channels of the input and the outputs of the last layer are always fixed. ``sane_ray.tokens.tracing`` sees
    all that a module does, and finds the permutations that are left out here.

    Args:
        table: Its tokenised and untokenised entries are both looked at, so batch norms are permuted even if they are
            not tokenised.
        hints: What a config file says of the model: ``model::type``; ``num_layers`` and ``num_units`` of the Small CNN
            Zoo; ``num_attention_heads`` (or ``n_head``, ``num_heads``, ``nhead``), ``num_key_value_heads``,
            ``hidden_size`` (or ``n_embd``, ``d_model``). Others are ignored.

    Returns:
        The symmetry, whose ``origin`` names the family.
    """
    modules, hints = modules_of(table), hints or {}
    for name, family in _FAMILIES.items():
        try:
            found = family(modules, hints)
        except _NotThisFamily:
            continue
        return dataclasses.replace(found, origin="" if found.is_trivial else f"names and shapes: {name}")
    return Symmetry({}, {})


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

    def head(self, module: str, source: _Stream) -> None:
        """The last layer, which reads pooled maps."""
        if self.inputs_of(module) != source.size:
            raise _NotThisFamily
        self.layer(module, source, None)

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

    def norm(self, module: str, stream: _Stream, flattened: bool = False) -> None:
        """A batch norm of a stream, or where maps may have been flattened of blocks of it."""
        tensors = self._take(module)
        if not is_batch_norm(tensors) or not stream.feeds(tensors["running_mean"][0], flattened):
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


def _chain(modules: Modules, hints: Mapping[str, object]) -> Symmetry:
    """Modules numbered under one prefix, each reading the one before."""
    paths = [re.fullmatch(r"(|.+\.)(\d+)", module) for module in modules]
    prefixes = {path[1] for path in paths if path}
    if not all(paths) or len(prefixes) != 1:
        raise _NotThisFamily
    ordered = sorted(modules, key=_number)
    layers = [module for module in ordered if is_layer(modules[module])]
    if not layers:
        raise _NotThisFamily
    weights = [modules[layer]["weight"] for layer in layers]
    if _is_zoo_net(prefixes.pop(), weights, hints):
        return _in_order(modules, ordered, range(len(layers)))
    if not _has_gaps(ordered, layers) and not _has_no_equal_widths(modules, weights):
        raise _NotThisFamily
    linear = [len(weight) == 2 for weight in weights]
    certain = [place for place in range(len(layers) - 1) if linear[place] and linear[place + 1]]
    if "bias" not in modules[layers[0]]:
        certain = [place for place in certain if place]
    return _in_order(modules, ordered, certain)


def _number(module: str) -> int:
    return int(module.rpartition(".")[2])


def _is_zoo_net(prefix: str, weights: Sequence[tuple[int, ...]], hints: Mapping[str, object]) -> bool:
    """Whether a config or the layout says that layers are those of a network whose code is known."""
    container = prefix.removesuffix(".").rpartition(".")[2]
    if container == "module_list":
        shapes = tuple((channels, *kernel) for channels, _, *kernel in weights[:-1])
        return hints.get("model::type") in _ZOO_TYPES or shapes in _ZOO_CNNS
    *maps, last = weights
    if container != "layers" or "num_layers" not in hints or len(last) != 2:
        return False
    units = hints.get("num_units")
    pooled = len(maps) == hints["num_layers"] and last[1] == units
    return pooled and all(len(weight) == 4 and weight[0] == units for weight in maps)


def _has_gaps(ordered: Sequence[str], layers: Sequence[str]) -> bool:
    """Whether numbers are missing between any two layers, as those of functions in an ``nn.Sequential`` are."""
    numbers = {_number(module) for module in ordered}
    return all(not numbers.issuperset(range(_number(layer), _number(later))) for layer, later in pairwise(layers))


def _has_no_equal_widths(modules: Modules, weights: Sequence[tuple[int, ...]]) -> bool:
    """Whether only one order of linear layers fits, and nothing can be added to anything else."""
    widths = [weights[0][1], *(weight[0] for weight in weights)]
    plain = all(is_layer(tensors) or is_batch_norm(tensors) for tensors in modules.values())
    return plain and all(len(weight) == 2 for weight in weights) and len(set(widths)) == len(widths)


def _vgg(modules: Modules, hints: Mapping[str, object]) -> Symmetry:
    """Numbered convolutions and norms under ``features``, then linear layers under ``classifier``."""
    paths = {module: re.fullmatch(r"(|.+\.)(features|classifier)(?:\.(\d+))?", module) for module in modules}
    found = {module: (path[1], path[2], path[3] and int(path[3])) for module, path in paths.items() if path}
    if found.keys() != modules.keys() or len({prefix for prefix, _, _ in found.values()}) != 1:
        raise _NotThisFamily
    features = {number: _kernel(modules[module]) for module, (_, part, number) in found.items() if part == "features"}
    heads = {number: modules[module] for module, (_, part, number) in found.items() if part == "classifier"}
    numbers = sorted(heads, key=lambda number: number or 0)
    flat = all(is_layer(tensors) and len(tensors["weight"]) == 2 for tensors in heads.values())
    layouts = [_ALEXNET, *(_vgg_features(stages, norms) for stages in _VGG_STAGES for norms in (False, True))]
    if features not in layouts or numbers not in _CLASSIFIERS or not flat:
        raise _NotThisFamily
    ordered = sorted(modules, key=lambda module: (found[module][1] == "classifier", found[module][2] or 0))
    return _in_order(modules, ordered, range(len(ordered)))


def _vgg_features(stages: Sequence[int], norms: bool) -> dict[int, int]:
    """Kernel of each convolution by its number, 0 for a batch norm; a function follows, and a pooling each stage."""
    kernels, number = {}, 0
    for stage in stages:
        for _ in range(stage):
            kernels[number] = 3
            if norms:
                kernels[number + 1] = 0
            number += 3 if norms else 2
        number += 1
    return kernels


def _kernel(tensors: Tensors) -> int | None:
    """Side of a square kernel, 0 for a batch norm, None for anything else."""
    if is_batch_norm(tensors):
        return 0
    weight = tensors.get("weight", ())
    return weight[2] if is_layer(tensors) and len(weight) == 4 and weight[2] == weight[3] else None


def _in_order(modules: Modules, ordered: Sequence[str], certain: Sequence[int]) -> Symmetry:
    """Modules of which each reads the one before.

    Args:
        modules: All of them.
        ordered: Their names in the order in which they are used.
        certain: Which of the layers have outputs that may move.
    """
    places = [place for place, module in enumerate(ordered) if is_layer(modules[module])]
    assembly, stream = _Assembly(modules), None
    for module in ordered[: places[0]]:
        assembly.skip(module)
    for count, (place, end) in enumerate(zip(places, [*places[1:], len(ordered)], strict=True)):
        layer, between = ordered[place], ordered[place + 1 : end]
        alike = all(_leaves_channels_alone(modules[module]) for module in between)
        free = alike and place != places[-1] and count in certain
        stream = assembly.layer(layer, stream, layer if free else None)
        for module in between:
            if free and is_batch_norm(modules[module]):
                assembly.norm(module, stream, flattened=True)
            else:
                assembly.skip(module)
    return assembly.finish()


def _resnet(modules: Modules, hints: Mapping[str, object]) -> Symmetry:
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
    norms_come_last, begun = False, 0
    for stage, block in sorted(blocks):
        before = stream
        stream, shown = _residual_block(assembly, f"{prefix}layer{stage}.{block}", blocks[stage, block], stream)
        norms_come_last |= shown
        begun += stream.name != before.name
    if not begun or not norms_come_last:  # with equal widths all over, norms may as well come before convolutions
        raise _NotThisFamily
    assembly.head(prefix + head, stream)
    return assembly.finish()


def _residual_block(assembly: _Assembly, block: str, parts: set[str], stream: _Stream) -> tuple[_Stream, bool]:
    """Two or three convolutions whose sum with the shortcut shares one permutation.

    Returns:
        The stream after the block, and whether the length of a norm shows that it follows its convolution.
    """
    shortcut = next((name for name in ("downsample", "shortcut") if f"{name}.0" in parts), None)
    result, shown = stream, False
    if shortcut is not None:
        result = assembly.layer(f"{block}.{shortcut}.0", stream, f"{block}.{shortcut}")
        assembly.norm(f"{block}.{shortcut}.1", result)
    depth = 3 if "conv3" in parts else 2
    inner = stream
    for place in range(1, depth + 1):
        conv, read = f"{block}.conv{place}", inner.size
        if depth == 3 and place == 2 and assembly.inputs_of(conv) != inner.size:
            inner = assembly.grouped(conv, inner)
        else:
            inner = assembly.layer(conv, inner, result.name if place == depth else conv)
        assembly.norm(f"{block}.bn{place}", inner)
        shown |= inner.size != read
    if inner.size != result.size:  # a shortcut that pads channels with zeros ties them to their places
        raise _NotThisFamily
    return result, shown


def _pre_activation_resnet(modules: Modules, hints: Mapping[str, object]) -> Symmetry:
    """Wide ResNet with norms before convolutions, as in re-basin code; a shortcut reads what the first norm made."""
    blocks: dict[tuple[str, int, int], set[str]] = {}
    for module in modules:
        part = re.fullmatch(r"(|.+\.)block(\d+)\.layer\.(\d+)\.(\w+)", module)
        if part:
            blocks.setdefault((part[1], int(part[2]), int(part[3])), set()).add(part[4])
    if len({prefix for prefix, _, _ in blocks}) != 1 or not any("convShortcut" in parts for parts in blocks.values()):
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
    assembly.head(f"{prefix}fc", stream)
    return assembly.finish()


_FAMILIES: dict[str, Callable[[Modules, Mapping[str, object]], Symmetry]] = {
    "chain": _chain,
    "VGG": _vgg,
    "ResNet": _resnet,
    "wide ResNet": _pre_activation_resnet,
    "inner units of blocks": inner_symmetry,
}
"""By what the origin of a symmetry calls them; the first that fits is taken."""
