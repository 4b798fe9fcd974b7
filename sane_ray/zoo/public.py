"""The public zoos that can be downloaded by name: where each lies, what it holds, and which reader reads it.

A table and nothing else; ``zoo/download.py`` fetches. What a record holds today is asked of the archive then.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sane_ray.errors import InputError


@dataclass(frozen=True)
class PublicZoo:
    """One zoo that its authors published."""

    name: str
    """As in ``--zoo``."""
    about: str
    """What it holds, in a line."""
    reader: str | None
    """Reader of what is in it; None where nothing can read it without running code from it."""
    license: str
    """As its authors state it."""
    record: int | None = None
    """Record of the archive that holds it; None where ``address`` says where it is."""
    files: str = "*.zip"
    """Which files of the record, as a shell pattern."""
    address: str = ""
    """Address of its one file, where that is in no record."""
    unpack: bool = True
    """False where the reader reads the archive as it is."""


_CC_BY = "CC-BY-4.0"
_SMALL_CNN = "https://storage.googleapis.com/gresearch/smallcnnzoo-dataset"


def _model_zoo(name: str, record: int, about: str, files: str = "*.zip") -> PublicZoo:
    return PublicZoo(name, about, reader="tune", license=_CC_BY, record=record, files=files)


def _small_cnn_zoo(images: str, file: str, checkpoints: int) -> PublicZoo:
    about = f"{checkpoints:,} checkpoints of 30,000 CNNs on {images}, 4,970 parameters (Unterthiner et al. 2020)"
    address = f"{_SMALL_CNN}/{file}"
    return PublicZoo(f"small-cnn-{images}", about, reader="small_cnn_zoo", license=_CC_BY, address=address)


ZOOS = (
    _model_zoo(
        "cifar10-cnn-sample",
        13144018,
        "CNNs on CIFAR-10, epochs 21-25: the sample that SANE was published with",
        "cifar10_cnn_sample_ep21-25.zip",
    ),
    _model_zoo("mnist-cnn", 6632086, "small CNNs on MNIST (2,464 parameters)"),
    _model_zoo("fmnist-cnn", 6632104, "small CNNs on Fashion-MNIST (2,464 parameters)"),
    _model_zoo("svhn-cnn", 6632120, "small CNNs on SVHN"),
    _model_zoo("usps-cnn", 6633626, "small CNNs on USPS"),
    _model_zoo("cifar10-cnn", 6620868, "small and large CNNs on CIFAR-10 (2,864 and 10,853 parameters)"),
    _model_zoo("stl10-cnn", 6631783, "small and large CNNs on STL-10 (2,864 and 10,853 parameters)"),
    PublicZoo(
        "stl10-cnn-preprocessed",
        "the same as pickled data sets, which only their own code can read: take stl10-cnn",
        reader=None,
        license=_CC_BY,
        record=6634138,
        files="*.pt",
    ),
    _model_zoo("mnist-cnn-sparse", 7023335, "sparsified twins of the CNNs on MNIST"),
    _model_zoo("svhn-cnn-sparse", 7027566, "sparsified twins of the CNNs on SVHN"),
    _model_zoo("eurosat-cnn", 8141666, "CNNs on EuroSAT"),
    _model_zoo("cifar10-resnet18", 6974028, "ResNet-18 on CIFAR-10, some epochs"),
    _model_zoo("cifar100-resnet18", 6977381, "ResNet-18 on CIFAR-100, some epochs"),
    _model_zoo(
        "cifar100-resnet18-ep60", 6977382, "ResNet-18 on CIFAR-100, last epoch", "cifar100_resnet18_epoch60.zip"
    ),
    _model_zoo("tiny-imagenet-resnet18", 7023277, "ResNet-18 on Tiny-ImageNet, some epochs"),
    PublicZoo(
        "cnn-wild-park",
        "117,241 checkpoints of 2,800 CNNs of many shapes on CIFAR-10 (Kofinas et al. 2024); put "
        "cnn_park_splits.json beside the zip for the published split",
        reader="cnn_wild_park",
        license="as the record states it",
        record=12797219,
        files="cnn_wild_park.zip",
        unpack=False,
    ),
    _small_cnn_zoo("cifar10", "cifar10.tar.xz", 270_000),
    _small_cnn_zoo("fashion-mnist", "fashion_mnist.tar.xz", 270_000),
    _small_cnn_zoo("mnist", "mnist.tar.xz", 269_973),
    _small_cnn_zoo("svhn", "svhn_cropped.tar.xz", 269_892),
)
"""Every zoo that ``--zoo`` knows. Sources: the zoos' own pages (modelzoos.cc, dnn_predict_accuracy, neural-graphs)."""


def find(name: str) -> PublicZoo:
    """The zoo of a name.

    Raises:
        InputError: There is none; names the nearest.
    """
    known = {zoo.name: zoo for zoo in ZOOS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"--zoo {name!r} is no public zoo that is known here: {hint}`--zoo list` prints them all")
    return known[name]


def listing() -> str:
    """A table of all zoos: name, licence, where it is, and what it holds."""
    rows = [(zoo.name, zoo.license, where(zoo), zoo.about) for zoo in ZOOS]
    header = ("name", "licence", "where", "what")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]) for row in (header, *rows))


def where(zoo: PublicZoo) -> str:
    """Where a person finds the zoo: the page of its record, or the address of its file."""
    return f"https://zenodo.org/records/{zoo.record}" if zoo.record is not None else zoo.address
