import bz2
import gzip
import io
import lzma
import os
import random
import resource
import stat
import struct
import tarfile
import zipfile

import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.zoo.archives import DamagedArchive, Limits, as_folder, extract, is_archive, stem

KINDS = ("zip", "tar", "tar.gz", "tar.xz", "tar.bz2")
TAR_MODES = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}
CONTENT = {"zoo/a/weights": b"w" * 5000, "zoo/b/weights": os.urandom(3000), "zoo/params.json": b"{}", "zoo/empty": b""}


def pack(path, files, kind):
    """An archive of ``files`` (bytes by name); names are taken as they are."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        pack_tar(path, [member(name, content) for name, content in files.items()], kind)
    return path


def member(name, content=b"", type_=tarfile.REGTYPE, target="", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = type_, target, mode, len(content)
    return info, content


def pack_tar(path, members, kind="tar"):
    with tarfile.open(path, TAR_MODES[kind]) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target


def pack_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in members:
            archive.writestr(info, content)
    return path


def everything(root):
    """Every path under ``root`` with its content, links as their target."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in root.rglob("*")
    }


@pytest.fixture
def place(tmp_path):
    """A folder to unpack in, beside something that must not be touched."""
    (tmp_path / "place").mkdir()
    (tmp_path / "victim").write_bytes(b"untouched")
    return tmp_path / "place"


def refused(archive, place, match, limits=None, error=InputError):
    """Unpacking fails with the archive's name, and leaves the whole neighbourhood as it was."""
    before = everything(place.parent)
    with pytest.raises(error, match=match) as caught:
        extract(archive, place / "out", limits=limits)
    assert str(archive) in str(caught.value)
    assert everything(place.parent) == before


@pytest.mark.parametrize("kind", KINDS)
def test_unpacks_what_was_packed(kind, tmp_path):
    archive = pack(tmp_path / f"zoo.{kind}", CONTENT, kind)
    folder = extract(archive, tmp_path / "deep" / "out")
    assert {path: content for path, content in everything(folder).items() if content is not False} == CONTENT
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_archives_are_known_by_their_content(kind, tmp_path):
    archive = pack(tmp_path / "renamed.dat", CONTENT, kind)
    assert is_archive(archive)
    assert (extract(archive, tmp_path / "out") / "zoo" / "params.json").read_bytes() == b"{}"


def test_checkpoints_are_no_archives(tmp_path):
    weights = {"weight": torch.ones(2)}
    torch.save(weights, tmp_path / "new.pt.tar")
    torch.save(weights, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    assert not is_archive(tmp_path / "new.pt.tar")
    assert not is_archive(tmp_path / "old.tar")
    assert not is_archive(tmp_path / "absent.zip")
    assert not is_archive(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "zoo/../../evil", "zoo/..", "..", "C:/evil", "C:\\evil"])
def test_names_that_leave_the_folder_are_refused(kind, name, place):
    archive = pack(place / f"x.{kind}", {"good": b"1", name: b"evil"}, kind)
    refused(archive, place, "outside its folder")


def test_backslashes_of_windows_zips_are_folders_and_cannot_leave(place):
    archive = pack(place / "good.zip", {"zoo\\a\\weights": b"1"}, "zip")
    assert (extract(archive, place / "good") / "zoo" / "a" / "weights").read_bytes() == b"1"
    refused(pack(place / "bad.zip", {"zoo\\..\\..\\evil": b"1"}, "zip"), place, "outside its folder")


@pytest.mark.parametrize("target", ["../victim", "../../victim", "/etc/passwd", "sub/../../../victim", ".."])
@pytest.mark.parametrize("type_", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_out_of_the_folder_are_refused(target, type_, place):
    refused(pack_tar(place / "x.tar", [member("link", type_=type_, target=target)]), place, "leads out of it")


def test_links_out_of_the_folder_are_refused_in_zips(place):
    for target in ("../victim", "/etc/passwd", "a/../../victim"):
        refused(pack_zip(place / "x.zip", [zip_link("link", target)]), place, "leads out of it")


@pytest.mark.parametrize("order", [1, -1])
def test_nothing_is_written_through_a_planted_link(order, place):
    """A link to the folder's parent and then a file below the link: in both orders."""
    for target, name in (("..", "link/victim"), ("../victim", "link/x")):
        tar = [member("link", type_=tarfile.SYMTYPE, target=target), member(name, b"evil")]
        refused(pack_tar(place / "x.tar", tar[::order]), place, "twice|leads out")
        zipped = [zip_link("link", target), (name, b"evil")]
        refused(pack_zip(place / "x.zip", zipped[::order]), place, "twice|leads out")


def test_chains_of_links_are_refused(place):
    """Each link stays inside by its words, and together they climb out."""
    members = [
        member("d/e/f/file", b"1"),
        member("down", type_=tarfile.SYMTYPE, target="d/e/f"),
        member("up", type_=tarfile.SYMTYPE, target="down/../../../.."),
        member("out", type_=tarfile.LNKTYPE, target="up/victim"),
    ]
    refused(pack_tar(place / "x.tar", members), place, "leads out of it|another link")
    members = [member("a", type_=tarfile.SYMTYPE, target="b"), member("b", type_=tarfile.SYMTYPE, target="a")]
    refused(pack_tar(place / "x.tar", members), place, "another link")


def test_links_inside_the_folder_are_kept_whatever_their_order(tmp_path):
    """A hub cache has such links: snapshots point at blobs."""
    members = [
        member("snapshots/1/model.safetensors", type_=tarfile.SYMTYPE, target="../../blobs/abc"),
        member("blobs/abc", b"weights"),
        member("same", type_=tarfile.LNKTYPE, target="blobs/abc"),
    ]
    folder = extract(pack_tar(tmp_path / "hub.tar", members), tmp_path / "out")
    link = folder / "snapshots" / "1" / "model.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == b"weights" == (folder / "same").read_bytes()
    assert link.resolve().is_relative_to(folder)


@pytest.mark.parametrize("type_", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_to_nothing_is_refused(type_, place):
    refused(pack_tar(place / "x.tar", [member("link", type_=type_, target="absent")]), place, "leads nowhere")


@pytest.mark.parametrize("type_", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_refused(type_, place):
    refused(pack_tar(place / "x.tar", [member("good", b"1"), member("thing", type_=type_)]), place, "thing is a device")
    info = zipfile.ZipInfo("thing")
    info.create_system, info.external_attr = 3, (stat.S_IFIFO | 0o644) << 16
    refused(pack_zip(place / "x.zip", [(info, b"")]), place, "thing is a device")


def test_nothing_unpacked_is_executable_or_of_another_user(tmp_path):
    tar = pack_tar(tmp_path / "x.tar", [member("run", b"#!/bin/sh", mode=0o6777)])
    info = zipfile.ZipInfo("run")
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o6777) << 16
    zipped = pack_zip(tmp_path / "x.zip", [(info, b"#!/bin/sh")])
    for number, archive in enumerate((tar, zipped)):
        mode = (extract(archive, tmp_path / str(number)) / "run").stat().st_mode
        assert stat.S_IMODE(mode) & ~0o666 == 0


def test_a_name_that_is_there_twice_is_refused(place):
    refused(pack_tar(place / "x.tar", [member("a", b"1"), member("a", b"2")]), place, "twice")
    refused(pack_tar(place / "x.tar", [member("a", b"1"), member("a/b", b"2")]), place, "twice")
    refused(pack_tar(place / "x.tar", [member("a/b", b"1"), member("a", b"2")]), place, "twice")
    with pytest.warns(UserWarning, match="Duplicate"):
        archive = pack_zip(place / "x.zip", [("a", b"1"), ("a", b"2")])
    refused(archive, place, "twice")


def test_a_bomb_after_the_end_is_refused(place):
    archive = pack(place / "x.tar.gz", {"a": b"1"}, "tar.gz")
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()) + bytes(9_000_000)))
    refused(archive, place, "after its end", Limits(small=1_000_000))


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_bombs_are_refused(kind, place):
    archive = pack(place / f"bomb.{kind}", {f"zeros{number}": bytes(300_000) for number in range(10)}, kind)
    refused(archive, place, "as bombs do", Limits(ratio=20, small=1_000_000))
    extract(archive, place / "allowed", limits=Limits(small=3_000_000))


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_files_are_refused(kind, place):
    archive = pack(place / f"x.{kind}", {f"f{number}": b"" for number in range(20)}, kind)
    refused(archive, place, "more than 19 files", Limits(entries=19))
    extract(archive, place / "allowed", limits=Limits(entries=20))


def test_what_the_disk_has_no_room_for_is_refused_before_it_is_written(place):
    info = tarfile.TarInfo("huge")
    info.size = 1 << 60
    (place / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    refused(place / "x.tar", place, "GB more are needed", Limits(small=1 << 62))


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_in_the_middle_leaves_nothing(kind, place):
    """As on a full disk: no file may grow beyond 100 kB."""
    archive = pack(place / f"x.{kind}", {"small": b"1", "large": b"1" * 300_000}, kind)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(archive, place, "cannot be unpacked.*large.*make room|cannot be unpacked.*too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_place_that_is_no_folder_is_refused(place):
    archive = pack(place / "x.zip", CONTENT, "zip")
    with pytest.raises(InputError, match="cannot be unpacked"):
        extract(archive, archive / "out")


@pytest.mark.parametrize("type_", [b"x", b"g", b"X", b"L", b"K"])
def test_headers_that_would_fill_the_memory_are_refused(type_, place):
    info = tarfile.TarInfo("long")
    info.type, info.size = type_, 1 << 40
    good = member("good", b"1")[0].tobuf() + b"1".ljust(512, b"\0")
    for before in (b"", good):
        (place / "x.tar").write_bytes(before + info.tobuf(tarfile.GNU_FORMAT))
        refused(place / "x.tar", place, "bytes of header", error=DamagedArchive)


def test_long_names_are_kept(tmp_path):
    name = f"{'d' * 200}/{'f' * 200}"
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=format_) as archive:
            archive.addfile(member(name, b"1")[0], io.BytesIO(b"1"))
        assert (extract(tmp_path / "x.tar", tmp_path / str(format_)) / name).read_bytes() == b"1"


def test_links_that_would_fill_the_memory_are_refused(place):
    refused(pack_zip(place / "x.zip", [zip_link("link", "x" * 5000)]), place, "link is a link of 5,000 bytes")


def test_zips_that_hold_more_than_they_say_are_refused(place):
    """The size in both headers is made smaller: only so many bytes are written, and their checksum is wrong."""
    archive = pack(place / "x.zip", {"a": b"1" * 5000}, "zip")
    archive.write_bytes(archive.read_bytes().replace(struct.pack("<I", 5000), struct.pack("<I", 10)))
    refused(archive, place, "truncated or damaged", error=DamagedArchive)


def test_encrypted_zips_are_refused_by_name(place):
    archive = pack(place / "x.zip", {"secret": b"1" * 100}, "zip")
    content = bytearray(archive.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + offset] |= 1
    archive.write_bytes(content)
    refused(archive, place, "secret is encrypted")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_archives_are_refused_wherever_they_are_cut(kind, place):
    whole = pack(place / "whole", CONTENT, kind).read_bytes()
    archive = place / f"cut.{kind}"
    step = 512 if kind == "tar" else max(1, len(whole) // 12)
    end = len(whole.rstrip(b"\0")) if kind == "tar" else len(whole)  # the last block of a tar is padded with many zeros
    for length in range(1, end, step):
        archive.write_bytes(whole[:length])
        refused(archive, place, "truncated or damaged|no zip, tar", error=DamagedArchive)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_archives_never_crash_and_never_reach_outside(kind, place):
    whole = pack(place / "whole", CONTENT, kind).read_bytes()
    archive = place / f"damaged.{kind}"
    generator = random.Random(0)
    for number in range(100):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 4, 40))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        archive.write_bytes(content)
        before = {path: value for path, value in everything(place.parent).items() if "out" not in path}
        try:
            extract(archive, place / f"out{number}")
        except InputError:
            assert not (place / f"out{number}").exists()
        after = {path: value for path, value in everything(place.parent).items() if "out" not in path}
        assert after == before


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_wrong_checksums_are_damage(kind, place):
    """One bit is wrong: of the file's content in the zip, of what the compressed stream says of itself elsewhere."""
    archive = pack(place / f"x.{kind}", {"a": os.urandom(5000)}, kind)
    content = bytearray(archive.read_bytes())
    content[{"zip": 1000, "tar.gz": -6, "tar.xz": -14, "tar.bz2": -3}[kind]] ^= 0x10
    archive.write_bytes(content)
    refused(archive, place, "truncated or damaged", error=DamagedArchive)


@pytest.mark.parametrize("pack_alone", [gzip.compress, lzma.compress, bz2.compress])
def test_a_compressed_file_is_no_tar(pack_alone, place):
    (place / "weights.gz").write_bytes(pack_alone(b"no tar" * 1000))
    refused(place / "weights.gz", place, "truncated or damaged", error=DamagedArchive)


@pytest.mark.parametrize("content", [b"", b"<html>no archive</html>"])
def test_what_is_no_archive_is_refused(content, place):
    (place / "x.zip").write_bytes(content)
    refused(place / "x.zip", place, "no zip, tar", error=DamagedArchive)
    refused(place / "absent.zip", place, "no such archive")


def test_nothing_is_unpacked_over_what_is_there(place):
    archive = pack(place / "x.zip", CONTENT, "zip")
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("kept")
    refused(archive, place, "exists already")


def test_an_attempt_that_was_killed_is_begun_anew(tmp_path):
    archive = pack(tmp_path / "x.tar", CONTENT, "tar")
    left = tmp_path / ".out.unpacking" / "zoo"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    folder = extract(archive, tmp_path / "out")
    assert not (folder / "zoo" / "half").exists()
    assert not left.exists()


def test_archives_inside_stay_as_they_are(tmp_path):
    inner = pack(tmp_path / "inner.zip", CONTENT, "zip").read_bytes()
    folder = extract(pack(tmp_path / "outer.zip", {"inner.zip": inner}, "zip"), tmp_path / "out")
    assert everything(folder) == {"inner.zip": inner}


def test_as_folder_unpacks_once_and_again_when_the_archive_changes(tmp_path):
    archive = pack(tmp_path / "zoo.tar.gz", CONTENT, "tar.gz")
    first = as_folder(archive, tmp_path / "cache")
    assert first.parent == tmp_path / "cache"
    assert first.name.startswith("zoo-")
    (first / "mark").write_text("the same folder")
    assert as_folder(archive, tmp_path / "cache") == first
    assert (first / "mark").exists()
    pack(archive, CONTENT | {"new": b"1"}, "tar.gz")
    second = as_folder(archive, tmp_path / "cache")
    assert second != first
    assert (second / "new").read_bytes() == b"1"
    with pytest.raises(InputError, match="no such archive"):
        as_folder(tmp_path / "absent.zip", tmp_path / "cache")


def test_stems():
    names = ["a.zip", "a.tar.gz", "a.tgz", "a.tar.xz", "a.b.tar.bz2", "a", ".zip"]
    assert [stem(name) for name in names] == ["a", "a", "a", "a", "a.b", "a", ".zip"]
