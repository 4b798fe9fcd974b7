"""What the published SANE code writes before training: windows of normalised tokens, and back to weights.

``dataset_torch.<split>/sample_<i>.pt`` holds one random window of W tokens of a checkpoint: ``w`` [views, W, T] (view
0 is the checkpoint itself, the others are permutations of it), its mask ``m`` [W, T], positions ``p`` [W, 3],
``props``; ``dataset_info_<split>.json`` and ``dataset_normalization_<split>.json`` lie beside the folder. Samples i,
i + n, i + 2n and so on are windows of the same of n checkpoints. Where they hold all of its tokens together, its
weights are restored: view 0, normalisation undone, a tensor [channels, values] for each layer with the bias, if it
had one, as last column, since no file says more of its shape. A checkpoint with tokens that are nowhere cannot be
restored, and is refused by name. Never opens ``dataset.pt`` or any other pickle of a class, and never guesses tokens.

Shape suffixes: W tokens of a window, N of a checkpoint, T token size.
"""

from __future__ import annotations

import json
import logging
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import Checkpoint, LoadedCheckpoint
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import walk
from sane_ray.zoo.tables import clean_text

NAME = "sane_preprocessed"
LOOKS_FOR = "dataset_torch.<split> folders with sample_<i>.pt in them (data sets prepared by the published SANE code)"

FEW = 10_000
"""Up to so many checkpoints, one sample of each is opened to list its properties and epoch; no more of it is read."""

MOST = 1_000_000
"""Checkpoints that a data set may say it has; the largest public zoo has a ninth of that."""

_LOG = logging.getLogger(__name__)
_FOLDER = re.compile(r"dataset_torch\.(.+)")
_SAMPLE = re.compile(r"sample_(\d+)\.pt")
_SPLITS = {"train": "train", "val": "val", "test": "test"}
_EXACT = 2**53  # whole numbers up to here are exact in a float
_BATCH_NORMS = ("bn", "downsample.1", "batchnorm")
_AGAIN = "copy it again, or prepare again from the original zoo"


@dataclass(frozen=True)
class _Info:
    """What ``dataset_info_<split>.json`` says: checkpoints n, their tokens N, names of the properties, epochs."""

    checkpoints: int
    tokens: int
    properties: tuple[str, ...]
    epochs: tuple[int, ...]
    standardize: bool | str | None
    zoo: str


def discover(root: Path) -> list[Record]:
    """Lists the checkpoints of every prepared split at or below ``root``, in the order in which they were prepared.

    A split's checkpoints are one model where their epochs run through the epochs that were prepared, else each is a
    model of its own: the files do not name the models. One whose windows do not hold all tokens is listed too, and
    refused when it is opened.

    Raises:
        InputError: A file beside the samples is no JSON, or lacks what the published code writes there.
    """
    if not root.is_dir():
        return []
    records: list[Record] = []
    for folder, names, files in walk(root):
        match = _FOLDER.fullmatch(folder.name)
        if match is not None:
            samples = {int(found[1]): name for name in files if (found := _SAMPLE.fullmatch(name))}
            records += _records(root, folder, match[1], dict(sorted(samples.items())))
        names[:] = [name for name in names if not name.startswith("checkpoint_")]  # other zoos have 100,000 of these
    return records


def open_checkpoint(record: Record) -> Checkpoint:
    """Restores one checkpoint from its windows.

    Returns:
        A tensor for each layer: [channels, values] with the bias as last column, or [channels] for the tensors of a
        batch norm. Their names are those of the normalisation file, or ``layer_<index>.weight`` where it has none.

    Raises:
        InputError: Tokens are missing, a file is damaged or contradicts the others, or the normalisation is unknown.
    """
    folder = Path(record.path)
    split = folder.name.removeprefix("dataset_torch.")
    info = _info(folder, split)
    if info is None:
        raise InputError(
            f"{_beside(folder, 'info', split)}: missing, so how many tokens a model has is not known; copy it there, "
            "or prepare again from the original zoo"
        )
    tokens_NT, mask_NT, positions_N3 = _assemble([folder / name for name in record.member.split()], info)
    layers = _layers(folder, tokens_NT, mask_NT, positions_N3)
    return LoadedCheckpoint(f"{folder}: {record.member}", _restored(folder, split, info, layers))


def _records(root: Path, folder: Path, split: str, samples: Mapping[int, str]) -> Iterator[Record]:
    if not samples:
        return
    info = _info(folder, split)
    windows = _windows(samples, info)
    inside = folder.parent.relative_to(root).as_posix() if folder != root else "."
    prefix = split if inside == "." else f"{inside}/{split}"
    properties = _properties(folder, windows, info)
    deciding = (_beside(folder, kind, split).absolute() for kind in ("info", "normalization"))
    beside = tuple(str(path) for path in deciding if path.exists())
    config: dict[str, Value] = {}
    if info is not None:
        config = {"standardize": info.standardize, "zoo_path": info.zoo}
        if info.standardize == "l2_ind":
            _LOG.warning(
                "%s: each layer was divided by its own norm and the norms were not kept (standardize l2_ind): "
                "the weights stay as they are; to have the real ones, prepare again from %s",
                folder,
                info.zoo,
            )
    for number, (model, epoch) in zip(windows, _models(list(windows), properties, info), strict=True):
        name = f"{prefix}/{model}"
        yield Record(
            id=f"{name}/{epoch}",
            model=name,
            epoch=epoch,
            path=str(folder.absolute()),
            properties=properties.get(number, {}),
            config=config,
            reader=NAME,
            member=" ".join(windows[number]),
            beside=beside,
            split=_SPLITS.get(split),
        )


def _windows(samples: Mapping[int, str], info: _Info | None) -> dict[int, list[str]]:
    """Files of each checkpoint's windows. One without any is expected in the first, and missed there when opened."""
    if info is None:
        return {index: [name] for index, name in samples.items()}
    found: dict[int, list[str]] = {number: [] for number in range(info.checkpoints)}
    for index, name in samples.items():
        found[index % info.checkpoints].append(name)
    return {number: names or [f"sample_{number}.pt"] for number, names in found.items()}


def _models(
    numbers: Sequence[int], properties: Mapping[int, dict[str, Value]], info: _Info | None
) -> Iterator[tuple[str, int]]:
    """Model and epoch of each checkpoint. The published code writes a model's epochs one after the other."""
    epochs = [properties.get(number, {}).get("training_iteration") for number in numbers]
    known = info.epochs if info is not None else ()
    if known and epochs == list(known) * (len(epochs) // len(known)):
        for place, number in enumerate(numbers):
            yield f"model_{number // len(known):06d}", known[place % len(known)]
        return
    for number, value in zip(numbers, epochs, strict=True):
        yield f"checkpoint_{number:06d}", value if isinstance(value, int) and value >= 0 else 0


def _properties(folder: Path, windows: Mapping[int, Sequence[str]], info: _Info | None) -> dict[int, dict[str, Value]]:
    """Properties of each checkpoint, from one of its samples; none where it cannot be read."""
    if info is None or not info.properties:
        return {}
    if len(windows) > FEW:
        _LOG.warning("%s: its %d checkpoints are listed without properties and epochs", folder, len(windows))
        return {}
    found = {}
    for number, names in windows.items():
        try:
            sample = _sample(folder / names[0])
            fits = sample.meta["props"].numel() == len(info.properties)
            values = sample.read("props").tolist() if fits else []
        except InputError:
            continue  # whoever opens it will be told why
        if fits:
            found[number] = {key: _whole(key, value) for key, value in zip(info.properties, values, strict=True)}
    return found


def _whole(key: str, value: float) -> Value:
    """The published code keeps all properties in one float tensor; iterations are whole numbers."""
    is_whole = key == "training_iteration" and math.isfinite(value) and value == int(value) and abs(value) < _EXACT
    return int(value) if is_whole else value


def _beside(folder: Path, kind: str, split: str) -> Path:
    return folder.parent / f"dataset_{kind}_{split}.json"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({str(error)[:200]}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an object; {_AGAIN}")
    return content


def _info(folder: Path, split: str) -> _Info | None:
    path = _beside(folder, "info", split)
    content = _json(path)
    if content is None:
        return None
    try:
        keys = content.get("properties") or content["property_keys"]["result_keys"]
        checkpoints, tokens = int(content["num_samples"]), int(content["max_positions"][0]) + 1
        if not 1 <= checkpoints <= MOST:
            raise ValueError(f"num_samples is {checkpoints}")
        if not 1 <= tokens < 2**63:
            raise ValueError(f"max_positions is {tokens - 1}")
        standardize = content.get("standardize")
        return _Info(
            checkpoints=checkpoints,
            tokens=tokens,
            properties=tuple(clean_text(str(key)) for key in keys),
            epochs=tuple(int(epoch) for epoch in content.get("epoch_list") or ()),
            standardize=standardize if isinstance(standardize, bool | None) else clean_text(str(standardize)),
            zoo=clean_text(str(content.get("zoo_path"))),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: lacks what the published code writes there ({type(error).__name__}: {str(error)[:200]}); {_AGAIN}"
        ) from error


def _sample(path: Path) -> Checkpoint:
    """One window: view 0 of 201 is read when it is asked for, and the rest is not."""
    sample = checkpoint.open_checkpoint(path)
    meta = sample.meta
    if not meta.keys() >= {"w", "m", "p", "props"}:
        raise InputError(f"{path}: lacks one of the tensors w, m, p and props; {_AGAIN}")
    w_VWT, m_WT, p_W3 = meta["w"], meta["m"], meta["p"]
    if w_VWT.dim() != 3 or not w_VWT.numel() or w_VWT.shape[1:] != m_WT.shape or p_W3.shape != (len(m_WT), 3):
        shapes = ", ".join(f"{key} {tuple(meta[key].shape)}" for key in ("w", "m", "p"))
        raise InputError(f"{path}: {shapes} are not [views, W, T], [W, T] and [W, 3]; {_AGAIN}")
    if not w_VWT.is_floating_point() or any(meta[key].is_complex() for key in ("m", "p", "props")):
        kinds = ", ".join(f"{key} {meta[key].dtype}" for key in ("w", "m", "p", "props"))
        raise InputError(f"{path}: {kinds} are not weights, a mask, positions and properties; {_AGAIN}")
    return sample


def _assemble(paths: Sequence[Path], info: _Info) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of a checkpoint from its windows: tokens [N, T], mask [N, T], positions [N, 3].

    Nothing of N tokens is made before the windows have been seen to hold as many.
    """
    held = torch.empty(0, dtype=torch.int64)
    windows: list[tuple[Checkpoint, Tensor]] = []
    for path in paths:
        sample = _sample(path)
        positions_W3 = sample.tensor("p").long()
        at_W = positions_W3[:, 0]
        if int(at_W.min()) < 0 or int(at_W.max()) >= info.tokens:
            raise InputError(
                f"{path}: has a token at {int(at_W.max())}, but a model has {info.tokens} tokens; {_AGAIN}"
            )
        if windows and windows[0][0].meta["w"].shape[2] != sample.meta["w"].shape[2]:
            raise InputError(f"{path}: has tokens of another size than {paths[0].name}; {_AGAIN}")
        held = torch.unique(torch.cat([held, at_W]))
        windows.append((sample, positions_W3))
        if len(held) == info.tokens:
            return _joined(windows, info.tokens)
    raise InputError(
        f"{paths[0]}: the {len(paths)} random window(s) of this checkpoint hold {len(held)} of its "
        f"{info.tokens} tokens, and the rest is nowhere; prepare again from the original zoo ({info.zoo[:1000]})"
    )


def _joined(windows: Sequence[tuple[Checkpoint, Tensor]], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, T], mask [N, T] and positions [N, 3] of windows that hold all N = ``count`` tokens together."""
    token_size = windows[0][0].meta["w"].shape[2]
    tokens_NT, mask_NT = torch.zeros(count, token_size), torch.zeros(count, token_size, dtype=torch.bool)
    positions_N3 = torch.zeros(count, 3, dtype=torch.int64)
    for sample, positions_W3 in windows:
        at_W = positions_W3[:, 0]
        shape = sample.meta["m"].shape
        tokens_NT[at_W] = sample.read("w", 0, shape.numel()).reshape(shape).float()
        mask_NT[at_W] = sample.tensor("m").bool()
        positions_N3[at_W] = positions_W3
    return tokens_NT, mask_NT, positions_N3


def _layers(folder: Path, tokens_NT: Tensor, mask_NT: Tensor, positions_N3: Tensor) -> list[Tensor]:
    """Normalised values of each layer, [channels, values], padding left out."""
    layers = []
    _, counts = torch.unique_consecutive(positions_N3[:, 1], return_counts=True)
    start = 0
    for index, count in enumerate(counts.tolist()):
        here = slice(start, start + count)
        start += count
        channels = int(positions_N3[here, 2].max()) + 1
        fits = channels > 0 and count % channels == 0 and int(positions_N3[here.start, 1]) == index
        rows_CR = tokens_NT[here].reshape(channels, -1) if fits else tokens_NT[:0]
        mask_CR = mask_NT[here].reshape(channels, -1) if fits else mask_NT[:0]
        width = int(mask_CR[0].sum()) if fits else 0
        if (
            not fits
            or not width
            or not torch.equal(mask_CR, (torch.arange(mask_CR.shape[1]) < width).expand_as(mask_CR))
        ):
            raise InputError(f"{folder}: positions and mask of layer {index} contradict each other; {_AGAIN}")
        layers.append(rows_CR[:, :width])
    return layers


def _restored(folder: Path, split: str, info: _Info, layers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Real weights by name, from normalised values [channels, values] of each layer."""
    path = _beside(folder, "normalization", split)
    content = _json(path)
    if content is None and info.standardize in (True, "minmax"):
        raise InputError(f"{path}: missing, so the normalisation cannot be undone; copy it there, or prepare again")
    mode = (content or {}).get("mode")
    if content is None or mode is None:  # not normalised, or by norms that were not kept
        return {f"layer_{index:03d}.weight": values for index, values in enumerate(layers)}
    keys = [key for key in content if key != "mode"]
    names = _names(keys, [values.shape[1] for values in layers])
    if mode not in ("standardize", "minmax") or names is None:
        raise InputError(
            f"{path}: describes {len(keys)} layers with mode {reprlib.repr(mode)}, but {folder.name} has {len(layers)} "
            "layers that were normalised by standardize or minmax; it is of another data set: " + _AGAIN
        )
    state_dict: dict[str, Tensor] = {}
    for name, values in zip(names, layers, strict=True):
        try:
            real = _undone(values, name, mode, content.get(name))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: no usable statistics of {name[:200]} ({error}); {_AGAIN}") from error
        module, _, tensor = name.rpartition(".")
        if f"{module}.running_mean" not in names:
            state_dict[name] = real
        else:  # of a batch norm the shapes are known
            state_dict[name] = real[:, 0].contiguous()
            if tensor == "weight" and real.shape[1] == 2:
                state_dict[f"{module}.bias"] = real[:, 1].contiguous()
    return state_dict


def _names(keys: Sequence[str], widths: Sequence[int]) -> list[str] | None:
    """Name of each layer, or None if the keys of the normalisation file cannot be those of the tokens.

    The published code normalises ``batchnorm*`` that it then leaves out of the tokens, and with ``minmax`` leaves
    running statistics, which it tokenises, as they are.
    """
    with_statistics: list[str] = []
    for key in keys:
        module, _, tensor = key.rpartition(".")
        is_batch_norm = tensor == "weight" and any(name in key for name in _BATCH_NORMS)
        with_statistics += [key, f"{module}.running_mean", f"{module}.running_var"] if is_batch_norm else [key]
    for names in (list(keys), [key for key in keys if "batchnorm" not in key], with_statistics):
        ones = (width == 1 for name, width in zip(names, widths, strict=False) if "running_" in name)
        if len(names) == len(widths) and all(ones):
            return names
    return None


def _undone(values: Tensor, name: str, mode: str, statistics: Mapping[str, Any] | None) -> Tensor:
    """Real values of a layer. What is no weight (running statistics) the published code standardises twice."""
    exact = values.double()
    if mode == "standardize":
        for _ in range(1 if "weight" in name else 2):
            exact = exact * _number(statistics, "std") + _number(statistics, "mean")
    elif statistics is not None:
        low, high = _number(statistics, "min"), _number(statistics, "max")
        exact = (exact + 1) * (high - low) / 2 + low
    return exact.float()


def _number(statistics: Mapping[str, Any] | None, key: str) -> float:
    if not isinstance(statistics, Mapping) or not isinstance(statistics[key], int | float):
        raise TypeError(f"{key} is no number")
    if not math.isfinite(statistics[key]):
        raise ValueError(f"{key} is {statistics[key]}")
    return float(statistics[key])
