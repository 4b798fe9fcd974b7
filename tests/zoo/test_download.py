import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sane_ray.errors import InputError
from sane_ray.zoo import public
from sane_ray.zoo.archives import DamagedArchive
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.download import BLOCK, RemoteFile, download, fetch, license_of
from sane_ray.zoo.public import PublicZoo, find, listing

NAME, RECORD, KEY = "cifar10-cnn-sample", 13144018, "cifar10_cnn_sample_ep21-25.zip"
PAUSE = 0.01


@dataclass
class Archive:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    """After how many bytes of a body to drop the connection, one for each of the first requests for a file."""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the first requests, of whatever kind."""
    ranges: bool = True
    etags: bool = True
    announce_length: bool = True
    stalls: list[int] = field(default_factory=list)
    """As ``cuts``, but the connection stays open and silent until ``release``."""
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    corrupt: int = 0
    """How many of the first bodies have a wrong byte."""
    change_after_cut: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    record: object = None
    """The record's JSON, or text that is none, in place of the true one."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def metadata(self):
        if self.record is not None:
            return self.record
        return {"id": RECORD, "metadata": {"license": {"id": "cc-by-4.0"}}, "files": [*map(self.entry, self.files)]}

    def entry(self, key):
        content = self.files[key]
        links = {"self": f"{self.url}/api/records/{RECORD}/files/{key}/content"}
        checksum = f"md5:{hashlib.md5(content).hexdigest()}"
        return {"key": key, "size": len(content), "checksum": checksum, "links": links}

    def ranges_asked(self):
        return [headers.get("Range") for path, headers in self.asked if path.endswith("/content")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    archive: Archive

    def do_GET(self):
        archive = self.archive
        archive.asked.append((self.path, dict(self.headers)))
        if archive.answers:
            status, headers = archive.answers.pop(0)
            self.reply(status, headers)
        elif self.path in archive.redirects:
            self.reply(302, {"Location": archive.redirects[self.path]})
        elif self.path == f"/api/records/{RECORD}":
            record = archive.metadata()
            self.reply(200, {}, (record if isinstance(record, str) else json.dumps(record)).encode())
        elif (match := re.fullmatch(r"/api/records/\d+/files/(.+)/content", self.path)) and match[1] in archive.files:
            self.send_content(archive, match[1])
        else:
            self.reply(404, {})

    def send_content(self, archive, key):
        content = archive.files[key]
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": tag} if archive.etags else {}
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status, start = 200, 0
        if match and archive.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(match[1])
            if start >= len(content):
                return self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = bytearray(content[start:])
        if archive.corrupt:
            archive.corrupt -= 1
            body[len(body) // 2] ^= 1
        cut = archive.cuts.pop(0) if archive.cuts else None
        if archive.stalls:
            return self.reply(status, headers, bytes(body), archive.stalls.pop(0), wait=True)
        if cut is not None:
            archive.files.update(archive.change_after_cut)
        return self.reply(status, headers, bytes(body), cut)

    def reply(self, status, headers, body=b"", cut=None, wait=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        chunked = body and not self.archive.announce_length
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        sent = body if cut is None else body[:cut]
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), sent) if chunked else sent)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            if wait:
                self.archive.stalled.set()
                self.archive.release.wait()
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive(monkeypatch):
    """A server on this machine that holds one record with the sample zoo."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    state = Archive()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"archive": state})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}"
        state.files = {KEY: sample_zoo(), "readme.txt": b"not asked for"}
        yield state
        server.shutdown()
        thread.join()


def sample_zoo(models=2):
    """A zip of a small zoo in the published layout, some of it incompressible."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for number in range(models):
            root = f"zoo/NN_tune_trainable_{number}"
            opened.writestr(f"{root}/params.json", json.dumps({"seed": number}))
            opened.writestr(f"{root}/result.json", json.dumps({"training_iteration": 21, "test_acc": 0.5}))
            opened.writestr(f"{root}/checkpoint_000021/checkpoints", os.urandom(200_000))
    return packed.getvalue()


def remote(archive, key=KEY, **changes):
    entry = archive.entry(key)
    file = RemoteFile(key, entry["links"]["self"], entry["size"], entry["checksum"])
    return replace(file, **changes)


def get(archive, tmp_path, **changes):
    download(remote(archive, **changes), tmp_path / KEY, pause=PAUSE)
    assert {path.name for path in tmp_path.iterdir()} == {KEY}
    return (tmp_path / KEY).read_bytes()


# one file


def test_downloads_a_file(archive, tmp_path):
    assert get(archive, tmp_path) == archive.files[KEY]


@pytest.mark.parametrize("known", [{}, {"size": None}, {"checksum": ""}, {"size": None, "checksum": ""}])
def test_goes_on_after_every_dropped_connection(archive, tmp_path, known):
    archive.cuts = [4 * BLOCK, 0, 2 * BLOCK, 1]
    assert get(archive, tmp_path, **known) == archive.files[KEY]
    assert archive.ranges_asked() == [None, "bytes=65536-", "bytes=65536-", "bytes=98304-", "bytes=98304-"]


def test_goes_on_where_a_killed_process_stopped(archive, tmp_path):
    (tmp_path / f"{KEY}.part").write_bytes(archive.files[KEY][:123_456])
    assert get(archive, tmp_path) == archive.files[KEY]
    assert archive.ranges_asked() == ["bytes=123456-"]


def test_without_checksum_and_version_it_begins_anew(archive, tmp_path):
    (tmp_path / f"{KEY}.part").write_bytes(b"another file's bytes")
    assert get(archive, tmp_path, checksum="") == archive.files[KEY]
    assert archive.ranges_asked() == [None]


@pytest.mark.parametrize("known", [{}, {"size": None}])
def test_a_complete_part_is_not_downloaded_again(archive, tmp_path, known):
    (tmp_path / f"{KEY}.part").write_bytes(archive.files[KEY])
    assert get(archive, tmp_path, **known) == archive.files[KEY]
    assert archive.ranges_asked() == ([] if not known else [f"bytes={len(archive.files[KEY])}-"])


def test_a_part_that_is_too_long_is_replaced(archive, tmp_path):
    (tmp_path / f"{KEY}.part").write_bytes(archive.files[KEY] + b"more")
    assert get(archive, tmp_path) == archive.files[KEY]


@pytest.mark.parametrize("etags", [True, False])
def test_a_server_without_ranges_sends_all_again(archive, tmp_path, etags):
    archive.ranges, archive.etags, archive.cuts = False, etags, [100_000]
    assert get(archive, tmp_path) == archive.files[KEY]
    assert len(archive.ranges_asked()) == 2


def test_a_server_that_always_cuts_without_ranges_is_given_up(archive, tmp_path):
    archive.ranges, archive.cuts = False, [100_000] * 50
    with pytest.raises(InputError, match=re.escape(archive.url)):
        download(remote(archive), tmp_path / KEY, pause=PAUSE)
    assert len(archive.ranges_asked()) < 10


def test_bodies_of_unknown_length(archive, tmp_path):
    archive.announce_length, archive.cuts = False, [100_000]
    assert get(archive, tmp_path, size=None) == archive.files[KEY]


@pytest.mark.parametrize("known", [{}, {"checksum": ""}])
def test_a_file_that_changes_between_two_tries_is_never_mixed(archive, tmp_path, known):
    old, new = archive.files[KEY], bytes(reversed(archive.files[KEY]))
    archive.cuts, archive.change_after_cut = [100_000], {KEY: new}
    file = remote(archive, **known)
    if known:
        download(file, tmp_path / KEY, pause=PAUSE)
        assert (tmp_path / KEY).read_bytes() == new
    else:  # the checksum is the old file's
        with pytest.raises(InputError, match=r"checksum is md5:"):
            download(file, tmp_path / KEY, pause=PAUSE)
        assert not (tmp_path / KEY).exists()
    assert old != new


def test_a_resumed_file_of_another_version_is_read_again_from_the_start(archive, tmp_path):
    """Without ETags a change shows only in the checksum."""
    archive.etags = False
    (tmp_path / f"{KEY}.part").write_bytes(b"\0" * 100_000)
    assert get(archive, tmp_path) == archive.files[KEY]
    assert archive.ranges_asked() == ["bytes=100000-", None]


def test_corrupt_bytes_are_downloaded_once_more_and_then_refused(archive, tmp_path):
    archive.corrupt = 1
    assert get(archive, tmp_path) == archive.files[KEY]
    (tmp_path / KEY).unlink()
    archive.corrupt = 2
    with pytest.raises(InputError, match=r"checksum is md5:.*, and the archive says md5:"):
        download(remote(archive), tmp_path / KEY, pause=PAUSE)
    assert list(tmp_path.iterdir()) == []


def test_busy_servers_are_asked_again(archive, tmp_path):
    archive.answers = [(429, {"Retry-After": "0"}), (500, {}), (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})]
    assert get(archive, tmp_path) == archive.files[KEY]


def test_servers_that_stay_busy_are_given_up(archive, tmp_path):
    archive.answers = [(503, {})] * 50
    with pytest.raises(InputError, match=r"it answers 503.*by hand"):
        download(remote(archive), tmp_path / KEY, pause=PAUSE)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusals_are_told_at_once(archive, tmp_path, status):
    archive.answers = [(status, {})]
    with pytest.raises(InputError, match=f"{re.escape(archive.url)}.*it answers {status}.*--source"):
        download(remote(archive), tmp_path / KEY, pause=PAUSE)
    assert len(archive.asked) == 1


def test_redirects_are_followed_and_keep_the_range(archive, tmp_path):
    moved = "/api/records/1/files/moved/content"
    archive.redirects = {moved: f"/api/records/2/files/{KEY}/content"}
    (tmp_path / f"{KEY}.part").write_bytes(archive.files[KEY][:1000])
    assert get(archive, tmp_path, address=archive.url + moved) == archive.files[KEY]
    assert archive.ranges_asked() == ["bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize(
    "target", ["http://example.org/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "//example.org/x"]
)
def test_only_https_is_followed(archive, tmp_path, target):
    start = "/api/records/1/files/moved/content"
    archive.redirects = {start: target}
    with pytest.raises(InputError, match="not HTTPS"):
        download(remote(archive, address=archive.url + start), tmp_path / KEY, pause=PAUSE)
    if not target.startswith("//"):
        with pytest.raises(InputError, match="not HTTPS"):
            download(remote(archive, address=target), tmp_path / KEY, pause=PAUSE)


def test_endless_redirects_are_refused(archive, tmp_path):
    loop = "/api/records/1/files/loop/content"
    archive.redirects = {loop: loop}
    with pytest.raises(InputError, match="redirects more than"):
        download(remote(archive, address=archive.url + loop), tmp_path / KEY, pause=PAUSE)


def test_a_server_that_is_not_there(archive, tmp_path):
    nobody = RemoteFile(KEY, "http://127.0.0.1:1/x")
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/x cannot be reached .*refused.*--source"):
        download(nobody, tmp_path / KEY, pause=PAUSE)


# whole zoos


def test_fetches_and_unpacks_a_zoo_once(archive, tmp_path):
    folder = fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert folder == tmp_path / NAME
    assert [record.epoch for record in discover(folder)] == [21, 21]
    said = json.loads((folder / ".download.json").read_text())
    assert said["license"] == "cc-by-4.0"
    assert said["source"] == f"https://zenodo.org/records/{RECORD}"
    assert [file["key"] for file in said["files"]] == [KEY]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    asked = len(archive.asked)
    assert fetch(NAME, tmp_path, base_url=archive.url) == folder
    assert len(archive.asked) == asked == 2


def test_a_killed_process_is_gone_on_from(archive, tmp_path):
    archive.stalls = [4 * BLOCK]
    script = "import sys; from sane_ray.zoo.download import fetch; fetch(*sys.argv[1:3], base_url=sys.argv[3])"
    child = subprocess.Popen([sys.executable, "-c", script, NAME, str(tmp_path), archive.url])
    assert archive.stalled.wait(60)
    part = tmp_path / f".{NAME}.partial" / f"{KEY}.part"
    while not (part.is_file() and part.stat().st_size == 4 * BLOCK):
        assert child.poll() is None
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    child.kill()
    child.wait()
    archive.release.set()
    assert not (tmp_path / NAME).exists()
    archive.asked.clear()
    fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert archive.ranges_asked() == ["bytes=65536-"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_what_is_unpacked_already_is_not_fetched_again(archive, tmp_path):
    """Killed between the last archive and the end: the record is asked for, no file is."""
    ready = tmp_path / f".{NAME}.partial" / "ready" / "cifar10_cnn_sample_ep21-25"
    ready.mkdir(parents=True)
    (ready / "unpacked").write_text("before")
    folder = fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert (folder / "unpacked").read_text() == "before"
    assert archive.ranges_asked() == []


def test_a_zoo_of_several_archives_has_a_folder_for_each(archive, tmp_path):
    archive.files = {"b.zip": sample_zoo(1), "a.zip": sample_zoo(2), "a.pt": b"pickled", "index_dict.json": b"{}"}
    zoo = PublicZoo("two", "two archives", "tune", "CC-BY-4.0", record=RECORD)
    folder = fetch(zoo, tmp_path, base_url=archive.url, pause=PAUSE)
    assert {path.name for path in folder.iterdir()} == {"a", "b", ".download.json"}
    assert len(discover(folder)) == 3


def test_archives_of_one_stem_do_not_collide(archive, tmp_path):
    archive.files = {"a.zip": sample_zoo(1), "a.tgz.zip": sample_zoo(1), "a.tar.zip": sample_zoo(1)}
    zoo = PublicZoo("three", "", "tune", "CC-BY-4.0", record=RECORD)
    folder = fetch(zoo, tmp_path, base_url=archive.url, pause=PAUSE)
    assert {path.name for path in folder.iterdir()} == {*archive.files, ".download.json"}


def test_a_zoo_that_is_read_packed_stays_packed(archive, tmp_path):
    archive.files = {"cnn_wild_park.zip": sample_zoo()}
    zoo = replace(find("cnn-wild-park"), record=RECORD)
    folder = fetch(zoo, tmp_path, base_url=archive.url, pause=PAUSE)
    assert (folder / "cnn_wild_park.zip").read_bytes() == archive.files["cnn_wild_park.zip"]


def test_a_zoo_at_an_address_of_its_own(archive, tmp_path):
    zoo = PublicZoo("own", "", "tune", "CC-BY-4.0", address=f"{archive.url}/api/records/1/files/{KEY}/content")
    archive.cuts = [4 * BLOCK]
    assert len(discover(fetch(zoo, tmp_path, pause=PAUSE))) == 2
    assert archive.ranges_asked() == [None, "bytes=65536-"]


def test_a_page_in_place_of_an_archive_is_refused_and_not_kept(archive, tmp_path):
    good, archive.files[KEY] = archive.files[KEY], b"<html>log in first</html>"
    zoo = PublicZoo("own", "", "tune", "CC-BY-4.0", address=f"{archive.url}/api/records/1/files/{KEY}/content")
    with pytest.raises(DamagedArchive, match="no zip, tar"):
        fetch(zoo, tmp_path, pause=PAUSE)
    archive.files[KEY] = good
    assert len(discover(fetch(zoo, tmp_path, pause=PAUSE))) == 2


def test_the_newer_form_of_a_record_is_understood(archive, tmp_path):
    entry = archive.entry(KEY)
    links = {"self": f"{archive.url}/metadata", "content": entry["links"]["self"]}
    archive.record = {"files": {"entries": {KEY: entry | {"links": links}}}}
    assert fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE).is_dir()


def test_a_record_without_the_file_says_what_it_holds(archive, tmp_path):
    archive.files = {"other.zip": b"x"}
    with pytest.raises(InputError, match=f"{KEY}.*holds other.zip"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)


@pytest.mark.parametrize("record", [{}, {"files": None}, {"files": [{"key": KEY}]}, {"files": ["x"]}, {"files": {}}])
def test_a_record_of_another_form_is_refused(archive, tmp_path, record):
    archive.record = record
    with pytest.raises(InputError, match="not the record that was expected"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)


@pytest.mark.parametrize("record", ["<html>", "[]", ""])
def test_what_is_no_record_is_asked_for_again_and_refused(archive, tmp_path, record):
    archive.record = record
    with pytest.raises(InputError, match="what it answers is no"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)


@pytest.mark.parametrize("key", ["../evil.zip", "/tmp/evil.zip", "a/b.zip", "a\\b.zip", ".evil.zip", "e\0vil.zip"])
def test_file_names_of_a_record_cannot_leave_the_folder(archive, tmp_path, key):
    archive.record = {"files": [archive.entry(KEY) | {"key": key}]}
    with pytest.raises(InputError, match="no plain file name"):
        fetch(PublicZoo("x", "", "tune", "", record=RECORD), tmp_path, base_url=archive.url, pause=PAUSE)
    assert archive.ranges_asked() == []


def test_files_elsewhere_must_be_https(archive, tmp_path):
    archive.record = {"files": [archive.entry(KEY) | {"links": {"self": "http://example.org/x"}}]}
    with pytest.raises(InputError, match=r"example.org/x, which is not HTTPS"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)


def test_no_network_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=rf"127.0.0.1:1/api.*https://zenodo.org/records/{RECORD} by hand.*--source"):
        fetch(NAME, tmp_path, base_url="http://127.0.0.1:1", pause=PAUSE)
    assert not (tmp_path / NAME).exists()


def test_what_the_disk_cannot_hold_is_refused_before_it_is_downloaded(archive, tmp_path):
    archive.record = {"files": [archive.entry(KEY) | {"size": 1 << 60}]}
    with pytest.raises(InputError, match=r"needs 1,152,921,504.6 GB"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert archive.ranges_asked() == []


def test_a_write_that_fails_is_told_and_gone_on_from(archive, tmp_path):
    """As on a full disk: no file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * BLOCK, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be saved \(File too large\).*goes on"):
            fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert archive.ranges_asked() == [None, f"bytes={8 * BLOCK}-"]


def test_a_storage_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file cannot hold a zoo"):
        fetch(NAME, tmp_path / "file")


def test_licence_of_a_downloaded_zoo(archive, tmp_path):
    folder = fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert license_of(folder) == "cc-by-4.0"
    assert license_of(tmp_path) is None
    (folder / ".download.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        license_of(folder)


def test_a_record_that_states_no_licence_has_the_one_of_the_table(archive, tmp_path):
    archive.record = {"files": [archive.entry(KEY)]}
    assert license_of(fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)) == "CC-BY-4.0"


def test_a_folder_of_that_name_that_was_not_downloaded_is_left_alone(archive, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine").write_text("kept")
    with pytest.raises(InputError, match="was not downloaded"):
        fetch(NAME, tmp_path, base_url=archive.url, pause=PAUSE)
    assert (tmp_path / NAME / "mine").read_text() == "kept"


def test_a_malicious_archive_leaves_nothing(archive, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        opened.writestr("../../evil", b"x")
    archive.files[KEY] = packed.getvalue()
    with pytest.raises(InputError, match="outside its folder"):
        fetch(NAME, tmp_path / "zoos", base_url=archive.url, pause=PAUSE)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil", NAME)]


# the table


def test_names_and_places_are_unique():
    zoos = public.ZOOS
    assert len({zoo.name for zoo in zoos}) == len(zoos)
    assert len({(zoo.record, zoo.files, zoo.address) for zoo in zoos}) == len(zoos)
    assert all((zoo.record is None) == bool(zoo.address) for zoo in zoos)
    assert all(zoo.address.startswith("https://") for zoo in zoos if zoo.address)


def test_the_records_of_the_published_zoos_are_all_there():
    records = {6632086, 6632104, 6632120, 6633626, 6620868, 6631783, 6634138, 7023335, 7027566, 8141666}
    records |= {6974028, 6977381, 6977382, 7023277, 13144018, 12797219}
    assert records <= {zoo.record for zoo in public.ZOOS}


def test_listing_names_every_zoo_in_a_line():
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == ["name", *(zoo.name for zoo in public.ZOOS)]
    assert all(zoo.license in line and zoo.about in line for zoo, line in zip(public.ZOOS, lines[1:], strict=True))


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"cifar10-cnn-smaple.*did you mean cifar10-cnn-sample.*--zoo list"):
        fetch("cifar10-cnn-smaple", Path("unused"))


def test_a_zoo_that_only_its_own_code_can_read_is_not_downloaded(tmp_path):
    with pytest.raises(InputError, match=r"stl10-cnn-preprocessed.*take stl10-cnn"):
        fetch("stl10-cnn-preprocessed", tmp_path)
    assert list(tmp_path.iterdir()) == []
