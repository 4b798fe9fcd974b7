"""Unpacks archives of zoos (zip, tar, tar.gz, tar.xz, tar.bz2) into a folder, without trusting a byte of them.

Every file is created anew under the folder and nowhere else: no absolute names, no ``..``, no devices, no executable
bits, nothing overwritten. Links are made last, once all files are in place, and only those that stay in the folder. The
folder appears when it is complete. Archives inside the archive stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from filelock import FileLock
from tqdm import tqdm

from sane_ray.errors import InputError
from sane_ray.zoo import foreign

CHUNK = 1 << 20
"""Bytes copied at a time."""


class DamagedArchive(InputError):
    """The archive is not what was once packed: a new copy of it may be."""


@dataclass(frozen=True)
class Limits:
    """When an archive is taken for a bomb, and refused."""

    entries: int = 5_000_000
    """Most files and folders. The largest public zoo has 117,241 checkpoints."""
    ratio: float = 200
    """Most bytes unpacked for a byte of the archive. Trained weights stay below 2, logs below 30."""
    small: int = 64 << 20
    """Bytes that any archive may unpack to, whatever the ratio."""


@dataclass(frozen=True)
class _Entry:
    """One name in an archive: a file to open, a folder, or a link to ``target`` (the name as the archive has it)."""

    name: str
    kind: Literal["file", "folder", "symbolic link", "hard link"]
    size: int = 0
    target: str = ""
    open: Callable[[], IO[bytes]] | None = None


def is_archive(path: str | Path) -> bool:
    """Whether a file is an archive by its content; zip files that ``torch`` wrote (checkpoints, programs) are not."""
    kind = _kind(Path(path))
    if kind != "zip":
        return kind is not None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            is_checkpoint = any(PurePosixPath(name).name == "data.pkl" for name in names[:10])
            return not is_checkpoint and foreign.of_zip(names) is None
    except (zipfile.BadZipFile, OSError, ValueError):
        return Path(path).suffix == ".zip"  # a damaged one is still to be named when it is unpacked


def extract(archive: str | Path, folder: str | Path, *, limits: Limits | None = None) -> Path:
    """Unpacks an archive into a new folder, which is there in whole or not at all.

    Args:
        archive: zip, tar, tar.gz, tar.xz or tar.bz2, recognised by its content.
        folder: Where to; must not exist yet, unless it is empty.
        limits: Against bombs.

    Returns:
        The folder.

    Raises:
        DamagedArchive: The archive is truncated or damaged, or no archive; nothing is left behind.
        InputError: It is encrypted, a bomb, too large for the disk, or holds a name, a link or a device that could
            reach outside the folder; nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise InputError(f"{archive}: no such archive; check the path")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: {archive} is not unpacked over it; move it away")
    unfinished = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier attempt that was killed
    try:
        unfinished.mkdir(parents=True)
        _unpack(archive, unfinished, limits or Limits())
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        where = f" at {error.filename}" if error.filename else ""
        raise InputError(
            f"{archive}: cannot be unpacked{where} ({error.strerror or error}); make room or give access, or unpack it "
            "elsewhere and name the folder"
        ) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def as_folder(archive: str | Path, cache: str | Path) -> Path:
    """The folder an archive unpacks to: made the first time, found again for as long as the archive does not change.

    Args:
        archive: As for ``extract``.
        cache: Folder of unpacked archives; this one gets a folder of its own in it.

    Raises:
        InputError: As ``extract``.
    """
    archive = Path(archive).absolute()
    if not archive.is_file():
        raise InputError(f"{archive}: no such archive; check the path")
    state = archive.stat()
    identity = f"{archive.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    folder = Path(cache) / f"{stem(archive.name)}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        return folder if folder.is_dir() else extract(archive, folder)


def stem(name: str) -> str:
    """An archive's file name without ``.zip``, ``.tar.gz`` and the like."""
    for suffix in (".gz", ".xz", ".bz2", ".tgz", ".txz", ".tbz2", ".zip", ".tar"):
        name = name.removesuffix(suffix) or name
    return name


_MAGIC = {b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x1f\x8b": "gz", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}


def _kind(path: Path) -> str | None:
    """``zip``, ``gz``, ``xz``, ``bz2`` or ``tar`` by the first bytes of the file; None if it is no archive."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if head[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, struct.error, EOFError, ValueError)


def _unpack(archive: Path, root: Path, limits: Limits) -> None:
    kind = _kind(archive)
    if kind is None:
        raise DamagedArchive(f"{archive}: no zip, tar, tar.gz, tar.xz or tar.bz2 archive; name one, or a folder")
    try:
        if kind == "zip":
            _unpack_zip(archive, root, limits)
        else:
            _unpack_tar(archive, root, limits, "" if kind == "tar" else kind)
    except InputError:
        raise
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the archive's
            raise
        raise DamagedArchive(f"{archive}: truncated or damaged ({error}); copy or download it again") from error
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{archive}: packed in a way that cannot be read ({error}); pack it again as tar.gz"
        ) from error


def _unpack_zip(archive: Path, root: Path, limits: Limits) -> None:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        secret = next((info.filename for info in infos if info.flag_bits & 0x1), None)
        if secret is not None:
            raise InputError(f"{archive}: {secret} is encrypted; unpack it with its password, and name the folder")
        writer = _Writer(archive, root, limits, total=sum(info.file_size for info in infos))
        writer.write_all(_zip_entry(archive, opened, info) for info in infos)


def _zip_entry(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Entry:
    mode = info.external_attr >> 16
    name = info.filename.replace("\\", "/")  # some Windows programs write them
    if info.is_dir() or stat.S_ISDIR(mode):
        return _Entry(name, "folder")
    if stat.S_ISLNK(mode):
        if info.file_size > _LONGEST_PATH:
            raise InputError(f"{archive}: {name} is a link of {info.file_size:,} bytes; it is refused")
        return _Entry(name, "symbolic link", target=os.fsdecode(opened.read(info)))
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise InputError(f"{archive}: {name} is a device or a pipe, no file; it is refused")
    return _Entry(name, "file", info.file_size, open=lambda: opened.open(info))


_LONGEST_PATH = 4096
_LARGEST_HEADER = 1 << 20
_LONG_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])  # read into memory


class _StrictHeader(tarfile.TarInfo):
    """Headers that fail where they are cut or damaged, where ``tarfile`` takes that for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_HEADERS and header.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"{header.name!r} has {header.size:,} bytes of header")
        return header

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _unpack_tar(archive: Path, root: Path, limits: Limits, compression: str) -> None:
    mode: Any = f"r:{compression}"
    with tarfile.open(archive, mode, tarinfo=_StrictHeader) as opened:
        writer = _Writer(archive, root, limits, total=None)
        writer.write_all(_tar_entry(archive, opened, member) for member in opened)
        padding = 0
        while block := opened.fileobj.read(CHUNK) if opened.fileobj else b"":  # to the end, where the checksum is
            padding += len(block)
            if padding > limits.small:
                raise InputError(
                    f"{archive}: goes on for more than {padding / 1e6:,.0f} MB after its end; it is refused"
                )


def _tar_entry(archive: Path, opened: tarfile.TarFile, member: tarfile.TarInfo) -> _Entry:
    if member.isdir():
        return _Entry(member.name, "folder")
    if member.issym() or member.islnk():
        return _Entry(member.name, "symbolic link" if member.issym() else "hard link", target=member.linkname)
    if not member.isreg():
        raise InputError(f"{archive}: {member.name} is a device or a pipe, no file; it is refused")
    return _Entry(member.name, "file", member.size, open=lambda: _content(opened, member))


def _content(opened: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = opened.extractfile(member)
    if content is None:  # only for what is no file
        raise tarfile.ReadError(f"{member.name} has no content")
    return content


class _Writer:
    """Writes the entries of one archive under a folder that was empty before."""

    def __init__(self, archive: Path, root: Path, limits: Limits, total: int | None) -> None:
        self._archive, self._root, self._limits = archive, root, limits
        self._total = total
        self._most = max(limits.small, limits.ratio * archive.stat().st_size)
        self._written = 0
        self._links: dict[PurePosixPath, _Entry] = {}

    def write_all(self, entries: Iterator[_Entry]) -> None:
        self._check_room(self._total or 0)
        with self._bar() as bar:
            for number, entry in enumerate(entries, start=1):
                if number > self._limits.entries:
                    raise InputError(f"{self._archive}: more than {self._limits.entries:,} files; unpack it by hand")
                self._write(entry, bar)
        for name, entry in self._links.items():
            self._link(name, entry)

    def _write(self, entry: _Entry, bar: tqdm[Any]) -> None:
        name = self._inside(entry.name)
        path = self._root / name
        try:
            if entry.kind == "folder":
                path.mkdir(parents=True, exist_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.open is None:
                if name in self._links:
                    raise FileExistsError
                self._links[name] = entry
            else:
                self._copy(entry, entry.open, path, bar)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self._archive}: {entry.name} is in it twice, or both file and folder") from error

    def _copy(self, entry: _Entry, open_entry: Callable[[], IO[bytes]], path: Path, bar: tqdm[Any]) -> None:
        """Writes a file that must not exist yet; its mode is that of any new file, so nothing is executable."""
        self._check_room(entry.size)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        copied = 0
        with open(descriptor, "wb") as file, open_entry() as content:  # noqa: PTH123
            while block := content.read(CHUNK):
                copied += len(block)
                if copied > entry.size:
                    raise InputError(f"{self._archive}: {entry.name} is longer than the archive says; it is refused")
                file.write(block)
                bar.update(len(block))
        if copied < entry.size:
            raise EOFError(f"{entry.name} ends after {copied:,} of {entry.size:,} bytes")
        self._written += copied

    def _link(self, name: PurePosixPath, entry: _Entry) -> None:
        """Makes a link to a file or folder of the archive; links to links, and links to nothing, are refused."""
        base = name.parent if entry.kind == "symbolic link" else PurePosixPath()
        target = PurePosixPath(os.path.normpath(base / entry.target))
        outside = entry.target.startswith("/") or ".." in target.parts or "\0" in entry.target
        through = any(part in self._links for part in (target, *target.parents))
        path, destination = self._root / name, self._root / target
        if outside or through or not destination.exists():
            why = "leads out of it" if outside else "leads to another link" if through else "leads nowhere"
            raise InputError(
                f"{self._archive}: the {entry.kind} {entry.name} -> {entry.target} {why}; "
                "unpack the archive by hand where you trust it, and name the folder"
            )
        try:
            if entry.kind == "symbolic link":
                path.symlink_to(os.path.relpath(destination, path.parent))
            else:
                path.hardlink_to(destination)
        except FileExistsError as error:
            raise InputError(f"{self._archive}: {entry.name} is in it twice") from error

    def _inside(self, name: str) -> PurePosixPath:
        """A name of the archive as a path under the folder; only its words are looked at, as no link is there yet."""
        path = PurePosixPath(name)
        drive = len(name) > 1 and name[1] == ":" and name[0].isalpha() and name[2:3] in ("/", "\\")
        if path.is_absolute() or drive or ".." in path.parts or "\0" in name:
            raise InputError(f"{self._archive}: {name} would be written outside its folder; the archive is refused")
        return path

    def _check_room(self, size: int) -> None:
        """Refuses bombs, and what the disk has no room for, before ``size`` more bytes are written."""
        after = self._written + size
        if after > self._most:
            raise InputError(
                f"{self._archive}: unpacks to more than {after / 1e6:,.0f} MB from "
                f"{self._archive.stat().st_size / 1e6:,.1f} MB, as bombs do; unpack it by hand where you trust it"
            )
        free = shutil.disk_usage(self._root).free
        if size > free:
            raise InputError(
                f"{self._archive}: {size / 1e9:,.1f} GB more are needed to unpack it, and the disk of "
                f"{self._root.parent} has {free / 1e9:,.1f} GB; free room, or name another --storage"
            )

    @contextlib.contextmanager
    def _bar(self) -> Iterator[tqdm[Any]]:
        with tqdm(
            total=self._total,
            desc=f"unpacking {self._archive.name}",
            unit="B",
            unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        ) as bar:
            yield bar
