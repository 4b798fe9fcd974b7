"""The hub is a real HTTP server on this machine, with the endpoints that the library asks for; no test goes further."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from sane_ray.errors import InputError
from sane_ray.zoo import hub
from sane_ray.zoo.readers import huggingface

COMMIT, OLDER = "a" * 40, "b" * 40
WEIGHTS = save({"fc.weight": torch.arange(600_000, dtype=torch.float32).reshape(600, 1000)})


def name_of(content: bytes) -> str:
    """As git names it, by its content."""
    return hashlib.sha1(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories by name: revisions to commits, commits to files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.sent: list[tuple[str, str | None]] = []  # path and range of every file sent
        self.cut_once: set[str] = set()  # files whose connection breaks half way, once
        self.short: set[str] = set()  # files that arrive shorter than announced

    def add(self, name: str, files: dict[str, bytes], revision: str = "main", commit: str = COMMIT) -> None:
        self.repositories.setdefault(name, {})[commit] = files
        self.refs.setdefault(name, {})[revision] = commit

    def commit(self, name: str, revision: str) -> str | None:
        return revision if revision in self.repositories[name] else self.refs[name].get(revision)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if name not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        rest = parts[4:] if is_api else parts[2:]
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        commit = self.server.commit(name, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if name in self.server.gated and verb != "revision":
            return self._refuse(403, "GatedRepo")
        files = self.server.repositories[name][commit]
        if verb == "revision":
            return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        if verb == "tree":
            return self._json(
                [
                    {"type": "file", "path": p, "size": len(b), "oid": f"{hash(b) & (2**64 - 1):040x}"}
                    for p, b in files.items()
                ]
            )
        path = "/".join(rest[2:])
        if path not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(path, files[path], commit, body)

    def _file(self, path: str, content: bytes, commit: str, body: bool) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        part = content[start:]
        if body:
            self.server.sent.append((path, wanted))
            if path in self.server.short:
                part = part[: len(part) // 2]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{name_of(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        if path in self.server.cut_once:
            self.server.cut_once.discard(path)
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    hub_server = Hub()
    thread = threading.Thread(target=hub_server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{hub_server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_fetches_safetensors_json_and_the_card_and_nothing_else(server, tmp_path):
    card = b"---\nlicense: mit\nbase_model: them/base\n---\n"
    wanted = {"model.safetensors": WEIGHTS, "config.json": b'{"hidden_size": 8}', "README.md": card}
    others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "modeling.py", "vocab.txt")
    server.add("me/net", {**wanted, **dict.fromkeys(others, b"x")})

    folder = hub.fetch("me/net", tmp_path)

    assert folder == tmp_path / "models--me--net" / "snapshots" / COMMIT
    assert names(folder) == sorted(wanted)
    [record] = huggingface.discover(folder)
    assert (record.model, record.license, record.parents) == ("me/net", "mit", ("them/base",))
    assert huggingface.open_checkpoint(record).tensor("fc.weight")[599, 999] == 599_999


def test_a_repository_without_safetensors_gives_its_torch_weights_and_not_the_optimizer(server, tmp_path):
    others = ("training_args.bin", "optimizer.pt", "scheduler.pt", "run/rng_state_0.pth", "tf_model.h5")
    server.add("me/old", {"pytorch_model.bin": b"weights", "config.json": b"{}", **dict.fromkeys(others, b"x")})
    assert names(hub.fetch("me/old", tmp_path)) == ["config.json", "pytorch_model.bin"]


def test_revision_after_the_at_sign_is_taken(server, tmp_path):
    server.add("me/net", {"model.safetensors": WEIGHTS})
    server.add("me/net", {"model.safetensors": WEIGHTS, "old.json": b"{}"}, revision="v1", commit=OLDER)
    assert names(hub.fetch("me/net@v1", tmp_path)) == ["model.safetensors", "old.json"]
    assert hub.fetch(f"me/net@{OLDER}", tmp_path).name == OLDER
    assert hub.fetch("me/net", tmp_path).name == COMMIT


def test_what_is_in_the_cache_is_not_fetched_again_and_works_offline(server, tmp_path, monkeypatch):
    server.add("me/net", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    folder = hub.fetch("me/net", tmp_path)
    sent = len(server.sent)
    assert hub.fetch("me/net", tmp_path) == folder
    assert len(server.sent) == sent
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert hub.fetch("me/net", tmp_path) == folder
    with pytest.raises(InputError, match=r"--hub me/other: not complete in the cache, and HF_HUB_OFFLINE is set"):
        hub.fetch("me/other", tmp_path)


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    weights = save({"fc.weight": torch.arange(6_000_000, dtype=torch.float32)})  # the library keeps blocks of 10 MB
    server.add("me/net", {"model.safetensors": weights})
    server.cut_once.add("model.safetensors")
    folder = hub.fetch("me/net", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == weights
    first, second = [wanted for path, wanted in server.sent if path == "model.safetensors"]
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= len(weights) // 2


def test_a_file_that_arrives_short_is_not_used(server, tmp_path):
    server.add("me/net", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    server.short.add("model.safetensors")
    with pytest.raises(InputError, match=r"--hub me/net: could not be fetched \(.*try again, what has arrived is kept"):
        hub.fetch("me/net", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert huggingface.discover(tmp_path) == []
    server.short.clear()
    assert (hub.fetch("me/net", tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_gated_missing_and_misspelt_repositories_and_revisions_are_refused_in_a_sentence(server, tmp_path):
    server.add("me/net", {"model.safetensors": WEIGHTS})
    server.add("me/gated", {"model.safetensors": WEIGHTS})
    server.gated.add("me/gated")
    for name, words in {
        "me/missing": "no such model repository, or a private one; check the name",
        "me/gated": "is gated; accept its terms on its page, then set HF_TOKEN",
        "me/net@v9": "the repository has no such revision",
        "me/net@": "no revision after the @",
        "me/net/model": "no name of a repository",
        "../net": "no name of a repository",
    }.items():
        with pytest.raises(InputError) as caught:
            hub.fetch(name, tmp_path)
        assert str(caught.value).startswith(f"--hub {name}: ")
        assert words in str(caught.value)


def test_a_hub_that_nobody_can_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"--hub me/net: could not be fetched \(.*check the network"):
        hub.fetch("me/net", tmp_path)


def test_a_repository_without_weights_is_refused(server, tmp_path):
    server.add("me/notes", {"README.md": b"no weights", "config.json": b"{}"})
    with pytest.raises(InputError, match=r"--hub me/notes: the repository holds no weights that can be read"):
        hub.fetch("me/notes", tmp_path)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as python does for what cannot be imported
    with pytest.raises(InputError, match=r"pip install 'sane_ray\[hub\]'"):
        hub.fetch("me/net", tmp_path)
