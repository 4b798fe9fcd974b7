"""Downloads a public zoo by name: resumed where it stopped, checked, unpacked safely, and there in whole or not at all.

Asks the archive which files the record holds, so sizes and checksums are its own. Talks HTTPS only (to this machine
itself also HTTP), follows no redirect to anything else, and never opens the weights.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from sane_ray.errors import InputError
from sane_ray.zoo.archives import DamagedArchive, extract, stem
from sane_ray.zoo.public import PublicZoo, find, listing, where

__all__ = ["ARCHIVE", "RemoteFile", "download", "fetch", "license_of", "listing"]

ARCHIVE = "https://zenodo.org"
"""Where the records of ``zoo/public.py`` are kept."""

PROVENANCE = ".download.json"
"""File in a downloaded zoo that says where it is from; it is the last one written."""

TRIES = 5
"""Attempts in a row that may fail without a new byte before it is given up."""

BLOCK = 1 << 14
"""Bytes read at a time; what is not a whole block yet is lost when the connection is."""

_LONGEST_PAUSE, _REDIRECTS, _TIMEOUT = 120.0, 5, (20, 60)
_WHO = {"User-Agent": "sane_ray"}
_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """One file to download."""

    key: str
    """Its name, without folders."""
    address: str
    """Where it is."""
    size: int | None = None
    """Bytes, where the archive says so."""
    checksum: str = ""
    """``<algorithm>:<hexadecimal digest>``, where the archive says so."""


def fetch(zoo: str | PublicZoo, folder: str | Path, *, base_url: str = ARCHIVE, pause: float = 1.0) -> Path:
    """Downloads and unpacks a public zoo; does nothing if that is done, and goes on if it was interrupted.

    Args:
        zoo: Its name (``listing()`` prints them all), or its entry.
        folder: Where zoos are kept; the zoo gets a folder of its name there.
        base_url: The archive of the records.
        pause: Seconds before the second attempt at something that failed; doubled each time.

    Returns:
        The zoo's folder: the content of its archive, or one folder an archive where it has several.

    Raises:
        InputError: No such zoo, no network, not enough disk, a file that is not what the archive says, another process
            that is downloading it, or a folder of that name that was not downloaded.
    """
    zoo = find(zoo) if isinstance(zoo, str) else zoo
    if zoo.reader is None:
        raise InputError(f"--zoo {zoo.name} cannot be read: {zoo.about}")
    destination = Path(folder) / zoo.name
    work = destination.with_name(f".{zoo.name}.partial")
    if _is_complete(destination):
        shutil.rmtree(work, ignore_errors=True)  # what a kill at the very end may have left
        return destination
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{work.parent} cannot hold a zoo ({error.strerror}): name another --storage") from error
    with _alone(work, zoo):
        if not _is_complete(destination):
            files, license_name = _contents(zoo, base_url, pause)
            _check_room(work, files)
            _write_provenance(zoo, files, license_name, _gather(zoo, files, work, pause)).rename(destination)
        shutil.rmtree(work, ignore_errors=True)
    return destination


def license_of(folder: str | Path) -> str | None:
    """The licence of a zoo that ``fetch`` has downloaded; None for any other folder."""
    path = Path(folder) / PROVENANCE
    try:
        stated = json.loads(path.read_text())["license"] if path.is_file() else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} is damaged ({error!r}): remove the folder, and download the zoo again") from error
    return stated if isinstance(stated, str) else None


def download(file: RemoteFile, path: Path, *, pause: float = 1.0) -> None:
    """Downloads one file to ``path``; what an earlier attempt left in ``<path>.part`` is gone on from.

    Raises:
        InputError: The server cannot be reached or refuses, the disk is full, or the content is not what it should be.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    digest = ""
    for _ in range(2):  # what was resumed wrongly is right when it is read from the start
        _patiently(lambda: _receive(file, part, tag), lambda: _size(part), file.address, pause)
        digest = _digest(part, file.checksum)
        tag.unlink(missing_ok=True)
        if digest == file.checksum.lower():
            part.rename(path)
            return
        part.unlink()
    raise InputError(
        f"{file.address}: the file's checksum is {digest}, and the archive says {file.checksum}; try again later, or "
        "download it by hand and name it with --source"
    )


def _is_complete(destination: Path) -> bool:
    if not destination.exists():
        return False
    if not (destination / PROVENANCE).is_file():
        raise InputError(f"{destination} exists, and was not downloaded: read it with --source, or move it away")
    return True


@contextlib.contextmanager
def _alone(work: Path, zoo: PublicZoo) -> Iterator[None]:
    """Holds the zoo's lock; a process that dies releases it."""
    try:
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"--zoo {zoo.name} is being downloaded to {work.parent} by another process: wait") from error


def _contents(zoo: PublicZoo, base_url: str, pause: float) -> tuple[list[RemoteFile], str]:
    """The zoo's files, and its licence as the archive states it (else as our table does)."""
    if zoo.record is None:
        return [RemoteFile(PurePosixPath(urlsplit(zoo.address).path).name, zoo.address)], zoo.license
    address = f"{base_url.rstrip('/')}/api/records/{zoo.record}"
    record = _patiently(lambda: _json(address), lambda: 0, address, pause, by_hand=where(zoo))
    try:
        listed = record["files"]
        entries = listed if isinstance(listed, list) else list(listed["entries"].values())
        files = [_remote_file(entry) for entry in entries]
        stated = (record.get("metadata") or {}).get("license") or {}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{address} is not the record that was expected ({error!r}): {_by_hand(where(zoo))}"
        ) from error
    chosen = sorted((file for file in files if fnmatch.fnmatch(file.key, zoo.files)), key=lambda file: file.key)
    if not chosen:
        held = ", ".join(file.key for file in files) or "nothing"
        raise InputError(f"{address} holds no file {zoo.files} (it holds {held}): {_by_hand(where(zoo))}")
    for file in chosen:
        if PurePosixPath(file.key).name != file.key or file.key.startswith(".") or re.search(r"[\\\0]", file.key):
            raise InputError(f"{address} names a file {file.key!r}, which is no plain file name; it is refused")
    return chosen, str(stated.get("id") or zoo.license)


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    links = entry["links"]
    return RemoteFile(
        entry["key"], links.get("content") or links["self"], int(entry["size"]), entry.get("checksum") or ""
    )


def _check_room(work: Path, files: list[RemoteFile]) -> None:
    """Refuses what the disk cannot hold even packed; unpacking checks again."""
    missing = sum(max(0, (file.size or 0) - _size(work / f"{file.key}.part")) for file in files)
    free = shutil.disk_usage(work).free
    if missing > free:
        raise InputError(
            f"the download needs {missing / 1e9:,.1f} GB, and the disk of {work.parent} has {free / 1e9:,.1f} GB free: "
            "free room, or name another --storage"
        )


def _gather(zoo: PublicZoo, files: list[RemoteFile], work: Path, pause: float) -> Path:
    """Downloads and unpacks every file that is not there yet, and returns the folder of all that they hold."""
    ready = work / "ready"
    ready.mkdir(exist_ok=True)
    names = [stem(file.key) if zoo.unpack else file.key for file in files]
    if len(set(names)) < len(names):
        names = [file.key for file in files]
    for file, name in zip(files, names, strict=True):
        packed = work / file.key
        if (ready / name).exists():
            continue
        if not packed.exists():
            download(file, packed, pause=pause)
        if zoo.unpack:
            _unpack(packed, ready / name, keep=bool(file.checksum))
        else:
            packed.rename(ready / name)
    return ready / names[0] if len(names) == 1 and (ready / names[0]).is_dir() else ready


def _unpack(packed: Path, folder: Path, keep: bool) -> None:
    """Unpacks a file and removes it; where it is damaged, it is only kept if it is what the archive has."""
    try:
        extract(packed, folder)
    except DamagedArchive:
        if not keep:
            packed.unlink()
        raise
    packed.unlink()


def _write_provenance(zoo: PublicZoo, files: list[RemoteFile], license_name: str, ready: Path) -> Path:
    """Writes into the folder where its content is from."""
    said = {"zoo": zoo.name, "about": zoo.about, "license": license_name, "source": where(zoo)}
    content = json.dumps(said | {"files": [asdict(file) for file in files]}, indent=1)
    (ready / PROVENANCE).write_text(content + "\n")
    return ready


class _TryAgain(Exception):
    """The server could not answer now; ``after`` is how many seconds it asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def _patiently(
    attempt: Callable[[], Result], progress: Callable[[], int], address: str, pause: float, by_hand: str = ""
) -> Result:
    """Attempts something until it works, or until it failed ``TRIES`` times without getting any further."""
    failures, furthest = 0, progress()
    while True:
        try:
            return attempt()
        except (requests.RequestException, _TryAgain) as error:
            reached = progress()
            failures = failures + 1 if reached <= furthest else 1
            furthest = max(furthest, reached)
            if failures >= TRIES:
                raise InputError(
                    f"{address} cannot be reached ({_reason(error)}): {_by_hand(by_hand or address)}"
                ) from error
            after = error.after if isinstance(error, _TryAgain) else 0.0
            wait = min(_LONGEST_PAUSE, max(after, pause * 2 ** (failures - 1)))
            _LOG.warning("%s: %s; trying again in %.3g s", address, _reason(error), wait)
        except OSError as error:
            raise InputError(
                f"what {address} sends cannot be saved ({error.strerror or error}): make room or give access, "
                "and run it again, it goes on from there"
            ) from error
        time.sleep(wait)


def _by_hand(address: str) -> str:
    return (
        "run it again when it can be reached, it goes on from where it is; or download "
        f"{address} by hand on another machine, and name the file or its folder with --source"
    )


def _reason(error: Exception) -> str:
    """The innermost words of a network error, which nests them."""
    if isinstance(error, _TryAgain):
        return str(error)
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _json(address: str) -> dict[str, Any]:
    with _get(address, {"Accept": "application/json"}) as response:
        try:
            content = json.loads(response.content)
        except ValueError as error:
            raise _TryAgain("what it answers is no JSON") from error
    if not isinstance(content, dict):
        raise _TryAgain("what it answers is no record")
    return content


def _receive(file: RemoteFile, part: Path, tag: Path) -> None:
    """Downloads what is missing of a file in one request.

    ``tag`` keeps what the server calls this version of the file, so that two versions are never mixed.

    Raises:
        _TryAgain: It is not complete yet.
    """
    offset = _size(part)
    if file.size is not None and offset == file.size:
        return
    version = tag.read_text() if tag.is_file() else ""
    resumable = version or file.checksum  # without either, nothing would tell that the file has changed
    if not resumable or (file.size is not None and offset > file.size):
        offset = 0
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": version} if version else {})
    with _get(file.address, headers) as response:
        start, total = _range(response)
        if response.status_code == 416 and offset and total == offset:
            return
        if start != 0 and start != offset:
            part.unlink(missing_ok=True)
            raise _TryAgain(f"it sends from byte {start} where byte {offset} was asked for")
        if start == 0:
            tag.write_text(_version(response))
        total = file.size if file.size is not None else total
        _save(response, part, start, total, file.key)
    if total is not None and _size(part) != total:
        raise _TryAgain(f"it sent {_size(part):,} of {total:,} bytes")


def _save(response: requests.Response, part: Path, start: int, total: int | None, name: str) -> None:
    """Writes the body after the first ``start`` bytes of the file; no more than one block beyond ``total``."""
    bar = tqdm(
        total=total,
        initial=start,
        desc=f"downloading {name}",
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    with part.open("ab" if start else "wb") as out, bar:
        for block in response.iter_content(BLOCK):
            out.write(block)
            bar.update(len(block))
            if total is not None and bar.n > total:
                break


def _range(response: requests.Response) -> tuple[int, int | None]:
    """Where the body starts in the file (-1: nowhere), and how long the file is, if the server says so."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None:
        return -1, None
    return int(match[1] or -1), int(match[2]) if match[2] != "*" else None


def _version(response: requests.Response) -> str:
    """What names this version of the file to the server: a strong ETag, or a date."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _get(address: str, headers: dict[str, str]) -> requests.Response:
    """Asks for an address, through redirects that stay safe; the answer is 200, 206 or 416.

    Raises:
        _TryAgain: The server is busy.
        InputError: It refuses, or leads away from HTTPS.
    """
    came_from = address
    for _ in range(_REDIRECTS + 1):
        _check_address(address, came_from)
        response = requests.get(address, headers=headers | _WHO, stream=True, timeout=_TIMEOUT, allow_redirects=False)
        if not response.is_redirect:
            return _checked(response, address)
        response.close()
        came_from, address = address, urljoin(address, response.headers["Location"])
    raise InputError(f"{came_from} redirects more than {_REDIRECTS} times; it is refused")


def _checked(response: requests.Response, address: str) -> requests.Response:
    status = response.status_code
    if status in (200, 206, 416):
        return response
    response.close()
    answer = f"it answers {status} {response.reason or ''}".rstrip()
    if status == 429 or status >= 500:
        after = response.headers.get("Retry-After", "")
        raise _TryAgain(answer, float(after) if after.isdigit() else 0.0)
    raise InputError(
        f"{address}: {answer}; look there whether it has moved, download it by hand, and name it with --source"
    )


def _check_address(address: str, came_from: str) -> None:
    """HTTPS everywhere; HTTP only on this machine, and not by a redirect from elsewhere."""
    if urlsplit(address).scheme == "https" or (_is_local(address) and _is_local(came_from)):
        return
    led = f"{came_from} leads to" if came_from != address else "the download is at"
    raise InputError(f"{led} {address}, which is not HTTPS; it is refused")


def _is_local(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")


def _digest(path: Path, expected: str) -> str:
    """``<algorithm>:<digest>`` of a file, read once; empty where nothing, or an unknown algorithm, is expected."""
    algorithm = expected.partition(":")[0].lower()
    if not expected:
        return ""
    if algorithm not in hashlib.algorithms_available:
        raise InputError(f"the archive gives the checksum {expected}, of a kind that is not known here")
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
