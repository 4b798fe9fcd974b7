import json
from pathlib import Path

import pytest

from sane_ray.zoo.readers.side_files import flat, json_of, object_of, text_of


def test_what_is_missing_is_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "none.json"
    assert (text_of(path), json_of(path), object_of(path)) == ("", None, {})
    path.touch()
    assert (text_of(path), json_of(path), object_of(path)) == ("", None, {})
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"1" * 5000, b"\xff", b"nope"])
def test_what_is_damaged_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    assert object_of(tmp_path / "a.json") == {}
    assert "a.json: not JSON" in caplog.text


def test_what_is_no_object_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.json").write_text("[1]")
    assert object_of(tmp_path / "a.json") == {} and json_of(tmp_path / "a.json") == [1]
    assert "a.json: holds a list, not an object" in caplog.text
    assert text_of("a\0b") == "" and object_of(tmp_path) == {}
    assert "cannot be read" in caplog.text


def test_a_mark_of_byte_order_is_no_content(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert object_of(tmp_path / "a.json") == {"a": 1}


def test_settings_become_flat():
    content = {"a": {"b": {"c": 1, "d": None}}, "list": [1, {"x": 2}], "id2label": {"0": "cat", "1": "dog"}}
    assert flat(content, labels=("id2label",)) == {
        "a::b::c": 1, "a::b::d": None, "list": '[1, {"x": 2}]', "num_labels": 2,
    }  # fmt: skip
    assert flat(content)["id2label::0"] == "cat"


@pytest.mark.parametrize("depth", [40, 900, 5000])
def test_settings_nested_as_deep_as_python_goes(depth: int):
    objects: dict = {"x": 1}
    lists: list = []
    for _ in range(depth):
        objects, lists = {"a": objects}, [lists]
    (key,) = settings = flat(objects)
    assert key.startswith("a::a::a") and isinstance(settings[key], str)
    assert isinstance(flat({"a": lists})["a"], str)


def test_halves_of_characters():
    settings = flat(json.loads('{"\\ud800": "\\udc00x"}'))
    assert settings == {"\\ud800": "\\udc00x"}
