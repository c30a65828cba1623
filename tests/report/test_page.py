"""The page: complete, well-formed, without anything from elsewhere, and with names escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.report.conftest import CLASSES
from widekernel.report.collecting import Report
from widekernel.report.kernels import KernelPictures, Kernels
from widekernel.report.page import SECTIONS, MissingPackageError, code, percent, render_page, significant
from widekernel.report.parts import Missing
from widekernel.report.pictures import heat_map, signed

VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction"}


class Parsed(HTMLParser):
    """Elements and their attributes; mismatched tags are errors."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> after {self.open}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def parsed(page: str) -> Parsed:
    return Parsed(page)


def test_every_section_is_there_and_named(parsed: Parsed) -> None:
    sections = [attributes["id"] for attributes in parsed.named("section")]
    assert sections == list(SECTIONS)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in parsed.named("a")} == {f"#{name}" for name in SECTIONS} | {"#content"}
    assert all(attributes["aria-labelledby"] in ids for attributes in parsed.named("section"))
    text = " ".join(parsed.texts)
    assert all(title in text for title in SECTIONS.values())
    assert len(parsed.named("h1")) == len(parsed.named("main")) == len(parsed.named("nav")) == 1


def test_nothing_comes_from_elsewhere(page: str, parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        for name in ADDRESSES & attributes.keys():
            assert attributes[name].startswith(("data:", "#")), (tag, name, attributes[name][:80])
    scripts_and_styles = "".join(re.findall(r"<(?:script|style)[^>]*>.*?</(?:script|style)>", page, re.DOTALL))
    for word in ("http:", "https:", "@import", "fetch(", "XMLHttpRequest", "WebSocket", "import(", "sendBeacon"):
        assert word not in scripts_and_styles, word
    assert not re.search(r"url\((?!#)", page)
    assert {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in parsed.elements} == set()
    assert len(page.encode()) < 5_000_000


def test_the_policy_allows_only_our_script(page: str, parsed: Parsed) -> None:
    policy = next(meta["content"] for meta in parsed.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None and page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [a for _, attributes in parsed.elements for a in attributes if a.startswith("on")]


def test_names_are_escaped(page: str, parsed: Parsed) -> None:
    for name in CLASSES:
        assert any(name in text for text in parsed.texts), name
    assert "<i>" not in page and "<script>alert" not in page
    assert "49" not in [text.strip() for text in parsed.texts if "7 * 7" in text]
    assert any("<i>run" in text for text in parsed.texts)


def test_tables_and_pictures_can_be_read_aloud(parsed: Parsed) -> None:
    assert len(parsed.named("table")) == len(parsed.named("caption")) > 10
    assert all(attributes.get("scope") in ("col", "row") for attributes in parsed.named("th"))
    assert all(attributes["alt"].endswith(".") for attributes in parsed.named("img"))
    drawn = [attributes for attributes in parsed.named("figure") if attributes.get("role") == "img"]
    assert len(drawn) == 3 and all(len(attributes["aria-label"]) > 30 for attributes in drawn)
    sortable = [attributes for attributes in parsed.named("th") if "aria-sort" in attributes]
    assert len(sortable) == len(parsed.named("button")) - 1


def test_drawings_take_their_colors_from_the_page(page: str) -> None:
    drawn = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 3, "losses, metrics, moves of the masks"
    assert any("var(--pale" in svg for svg in drawn) and all("currentColor" in svg for svg in drawn[:2])
    assert not any("#000000" in svg or "#ffffff" in svg for svg in drawn)


def test_sections_without_data_say_how_to_get_them(report: Report) -> None:
    missing = Missing("There is <b>nothing</b>.", "Do `this & that`.")
    names = ["training", "accuracy", "field", "kernels", "masks", "costs", "speed", "folding", "acceleration", "comparison"]
    bare = replace(report, **dict.fromkeys(names, missing), circumstances=replace(report.circumstances, settings=missing))
    text = render_page(bare)
    assert [attributes["id"] for attributes in Parsed(text).named("section")] == list(SECTIONS)
    assert text.count("There is &lt;b&gt;nothing&lt;/b&gt;.") == len(names) + 1
    assert text.count("<code>this &amp; that</code>") == len(names) + 1


def test_the_largest_kernels_stay_small(report: Report) -> None:
    generator = np.random.default_rng(0)
    parts = {label: generator.standard_normal((12, 61, 61)) for label in ("61×61", "61×5", "5×61", "folded")}
    shown = tuple(KernelPictures(f"layer {n}", tuple(range(12)), (1.0,) * 12, parts) for n in range(4))
    assert isinstance(report.kernels, Kernels)
    assert len(render_page(replace(report, kernels=replace(report.kernels, shown=shown))).encode()) < 3_000_000


def test_without_jinja2(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'widekernel\[report\]'"):
        render_page(report)


def test_texts() -> None:
    assert [significant(v) for v in (0, 1234567, 12.3456, 0.001234, None, float("nan"))] == [
        "0", "1.235e+06", "12.35", "0.0012", "–", "–"
    ]  # fmt: skip
    assert percent(0.1234) == "12.3 %" and percent(None) == "–"
    assert code("a `b<c` d") == "a <code>b&lt;c</code> d"


def test_signed_numbers_as_a_picture() -> None:
    values = np.array([[-1.0, 0.0, 1.0, np.nan, 0.5]])
    picture = signed(values, "numbers", np.array([[False, False, False, False, True]]))
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGBA"))[0]
    blue, zero, red, nothing, masked = pixels.tolist()
    assert blue[2] > blue[0] and red[0] > red[2] and blue[3] == red[3] == 255
    assert nothing[3] == 0 < zero[3] < 40 and masked[0] > masked[2]


def test_heat_maps_are_averaged_down() -> None:
    picture = heat_map(np.ones((1025, 1030)), "map", largest=512)
    assert (picture.width, picture.height) == (257, 256)
