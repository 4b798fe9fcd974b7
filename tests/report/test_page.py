"""A report is one HTML file: it parses, escapes what it is given, and refers to nothing outside."""

import base64
import re
from html.parser import HTMLParser

import pytest

from sane_ray.errors import InputError
from sane_ray.report.page import Bold, Code, Folded, Items, Picture, Section, Table, Text, number, write_report
from sane_ray.report.style import new_figure, save, shorten

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Tags with their attributes, the text in each tag, and whether every tag was closed where it had to be."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> list[str]:
        return [data for inside, data in self.texts if inside == tag]


def picture(folder, name="plot"):
    figure, axes = new_figure(1, 1, (3, 2))
    axes.plot([1, 2], [3, 4])
    return save(figure, folder / f"{name}.png")


def test_a_report_holds_everything_and_refers_to_nothing(tmp_path):
    png, _ = picture(tmp_path)
    blocks = [Text("what was done"), Items(["a", "b"]), Picture(png, "look here"), Code("x \\\n  y")]
    blocks += [Folded("more", [Table(["k", "v"], [["p", 1]])])]
    path = write_report(
        tmp_path / "new" / "report.html", "Title", [Section("One", blocks), Section("None", [])], "lead"
    )
    page = path.read_text()
    outline = Outline(page)
    assert outline.text("h1") == ["Title"] and outline.text("h2") == ["One"]
    assert outline.text("li") == ["a", "b"] and outline.text("figcaption") == ["look here"]
    assert outline.text("code") == ["x \\\n  y"] and outline.text("summary") == ["more"]
    sources = [value for _, attributes in outline.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [source.split(",")[0] for source in sources] == ["data:image/svg+xml;base64"]
    assert b"<svg" in base64.b64decode(sources[0].split(",")[1])
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    "block",
    [
        Text("<b>&\"'</b>"),
        Items(["<b>&\"'</b>"]),
        Code("<b>&\"'</b>"),
        Table(["<b>&\"'</b>"], [["<b>&\"'</b>"]], "<b>&\"'</b>"),
        Table(["k"], [[Bold("<b>&\"'</b>")]]),
        Folded("<b>&\"'</b>", []),
    ],
)
def test_everything_is_escaped(block, tmp_path):
    name = "<b>&\"'</b>"
    page = write_report(tmp_path / "r.html", name, [Section(name, [block])], name).read_text()
    outline = Outline(page)
    assert not any(tag == "b" for tag, _ in outline.tags)
    assert outline.text("h1") == outline.text("h2") == outline.text("title") == [name]
    assert name in [data for _, data in outline.texts][3:]


def test_a_caption_is_escaped_in_its_attribute_too(tmp_path):
    caption = '"><script>alert(1)</script>'
    page = write_report(tmp_path / "r.html", "t", [Section("s", [Picture(picture(tmp_path)[0], caption)])]).read_text()
    outline = Outline(page)
    assert next(attributes["alt"] for tag, attributes in outline.tags if tag == "img") == caption
    assert not any(tag == "script" for tag, _ in outline.tags)


def test_numbers_stand_right_and_the_best_is_bold():
    html = Table(["name", "r2", "note"], [["a", Bold("0.91 [0.90, 0.92]"), ""], ["b", None, "too few"]]).html()
    assert '<td class="number"><strong>0.91 [0.90, 0.92]</strong></td>' in html
    assert '<td class="number">–</td>' in html and "<td>too few</td>" in html and "<td>a</td>" in html


def test_a_very_large_drawing_is_put_in_as_png(tmp_path, monkeypatch):
    png, svg = picture(tmp_path)
    assert "image/svg+xml" in Picture(png).html()
    monkeypatch.setattr("sane_ray.report.page.SVG_LIMIT", 10)
    assert "image/png" in Picture(svg).html()
    png.unlink()
    assert "image/svg+xml" in Picture(svg).html()  # there is no other


@pytest.mark.parametrize("name", ["missing.png", "missing.svg", "report.txt"])
def test_a_missing_picture_is_refused_by_name(name, tmp_path):
    (tmp_path / "report.txt").write_text("no picture")
    with pytest.raises(InputError, match=name):
        write_report(tmp_path / "r.html", "t", [Section("s", [Picture(tmp_path / name)])])
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.12345, "0.123"),
        (1234567, "1,234,567"),
        (2e-6, "2e-06"),
        (-1e9, "-1e+09"),
        (True, "True"),
        ("x", "x"),
        (0.0, "0.000"),
    ],
)
def test_numbers_are_written_for_a_reader(value, shown):
    assert number(value) == shown


def test_long_names_keep_both_ends():
    assert shorten("layer1.0.conv1.weight", 40) == "layer1.0.conv1.weight"
    short = shorten("features.denseblock4.denselayer16.conv2.weight", 20)
    assert len(short) == 20 and short.startswith("features.d") and short.endswith("2.weight") and "…" in short
