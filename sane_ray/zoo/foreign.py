"""Files that hold networks in formats that are not read: what they are, why they are not read, and what to do.

Recognises a TorchScript archive and an exported program by the names in their zip directory, whatever the file is
called, and other formats by the suffix. Reads nothing else of a file, and never runs any of it.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sane_ray.shell import command


@dataclass(frozen=True)
class Format:
    """A format that is not read."""

    name: str
    """With an article."""
    why: str
    """It is not read."""
    remedy: str
    """How to get its weights into a file that is read."""
    recipe: str = ""
    """The same as one line of Python, which takes the names of the file and of the new one."""

    def refusal(self, path: str | Path) -> str:
        """What a file of this format is, why it is not read, and what to do, as one sentence."""
        return f"{path}: {self.is_not_read}; {self.remedy_for(path)}"

    def remedy_for(self, path: str | Path = "FILE") -> str:
        """What to do with a file, or with any; names are quoted, as a stranger may have given them."""
        if not self.recipe:
            return self.remedy
        names = shlex.join([str(path), str(Path(path).with_suffix(".safetensors"))])
        return f'{self.remedy}: {command("python")} -c "{self.recipe}" {names}'

    @property
    def is_not_read(self) -> str:
        """``is an ONNX graph, which is not read: …``."""
        return f"is {self.name}, which is not read: {self.why}"


_BY_TORCH = (
    "import sys, torch; from safetensors.torch import save_file; "
    "save_file({{k: v.contiguous().clone() for k, v in {weights}.items()}}, sys.argv[2])"
)
_BY_ONNX = (
    "import sys, onnx; from onnx.numpy_helper import to_array; from safetensors.numpy import save_file; "
    "save_file({t.name: to_array(t).copy() for t in onnx.load(sys.argv[1]).graph.initializer}, sys.argv[2])"
)
_TRUSTED = "where you trust its author, save its weights as safetensors"
_BY_ITS_PROGRAM = "load it with the program that wrote it, and save the weights as safetensors"

TORCHSCRIPT = Format(
    "a TorchScript archive (torch.jit.save)",
    "it is a program, which would have to be run",
    _TRUSTED,
    _BY_TORCH.format(weights="torch.jit.load(sys.argv[1], map_location='cpu').state_dict()"),
)
EXPORTED = Format(
    "an exported program (torch.export.save)",
    "it is a program, not weights alone",
    _TRUSTED,
    _BY_TORCH.format(weights="torch.export.load(sys.argv[1]).state_dict"),
)
_LITE = Format(
    "a TorchScript archive for mobile devices",
    "it is a program, which would have to be run",
    "save the state_dict() of the network it was made from as safetensors",
)

_BY_SUFFIX = {
    ".jit": TORCHSCRIPT,
    ".torchscript": TORCHSCRIPT,
    ".ptl": _LITE,
    ".pt2": EXPORTED,
    ".onnx": Format(
        "an ONNX graph",
        "its constants are no state dict",
        "save the state_dict() of the network it was exported from as safetensors, or where that is lost its constants",
        _BY_ONNX,
    ),
    ".keras": Format("a Keras archive", "it is another format", _BY_ITS_PROGRAM),
    ".h5": Format("an HDF5 file (Keras)", "it is another format", _BY_ITS_PROGRAM),
    ".gguf": Format("a GGUF file", "it is another format, often quantised", _BY_ITS_PROGRAM),
    ".tflite": Format("a TensorFlow Lite graph", "it is another format", _BY_ITS_PROGRAM),
    ".msgpack": Format("a MessagePack file (Flax)", "it is another format", _BY_ITS_PROGRAM),
}

SUFFIXES = tuple(_BY_SUFFIX)
"""Suffixes of files that hold networks and are not read."""


def by_suffix(path: str | Path) -> Format | None:
    """The format that the name of a file says; None if it says none of these. Does not open the file."""
    return _BY_SUFFIX.get(Path(path).suffix.lower())


def of_zip(names: Collection[str]) -> Format | None:
    """The format of a zip archive by the names in its directory; None if it is none of these."""
    inside = {name.partition("/")[2] for name in names if "/" in name}
    if "serialized_exported_program.json" in names or {"archive_format", "models/model.json"} <= inside:
        return EXPORTED
    is_program = "constants.pkl" in inside or any(name.startswith("code/") for name in inside)
    return TORCHSCRIPT if is_program and "data.pkl" in inside else None


def of_file(path: str | Path) -> Format | None:
    """The format of a file that is a zip archive of a program by its content, or another one by its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return of_zip(archive.namelist()) or by_suffix(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return by_suffix(path)


def by_format(paths: Sequence[str]) -> list[tuple[Format, list[str]]]:
    """Paths by the format that their names say, most frequent first; what is of none of these is left out."""
    groups: dict[Format, list[str]] = {}
    for path in paths:
        if (known := by_suffix(path)) is not None:
            groups.setdefault(known, []).append(path)
    return sorted(groups.items(), key=lambda group: -len(group[1]))
