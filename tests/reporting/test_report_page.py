"""The page of a run: what is on it, that it stays small, and that nothing in it comes from or goes elsewhere."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from scripts.reporting.pictures import save_png
from scripts.reporting.report_page import PICTURES, ROWS, write_page

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements, attributes, and the text of every element by its tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self):
        return " ".join(data for tag, data in self.texts if tag != "style")


def case(**more):
    return {
        "seconds": 2.0,
        "peak_memory_mb": 10.0,
        "contexts": {"1": ["ctx"]},
        "volumes_mm3": {"1": 1234.5, "7": 0.0},
        "warnings": [],
    } | more


def report(cases, **more):
    return {
        "fingerprint": "abc",
        "task": "segmentation",
        "labels": [1, 7],
        "contexts": ["ctx"],
        "spacing_mm": 1.5,
        "weights": {"file": "model.pt", "sha256": "1234"},
        "settings": {"overlap": 0.25},
        "device": "cpu",
        "targets": len(cases),
        "finished": True,
        "cases": cases,
        "failed": {},
    } | more


def written(content, folder):
    write_page(content, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_what_was_run_and_what_was_found(tmp_path):
    text = Page(written(report({"a": case(), "b": case(volumes_mm3={"1": 2000.0, "7": 3.0})}), tmp_path)).text()
    for wanted in ("model.pt, SHA-256 1234", "1.5 mm voxels", "cpu", "ctx", "1,234", "2,000", "abc", "research use"):
        assert wanted in text
    assert "Self-test" not in text and "Failed" not in text and "expected Dice" not in text.split("come first")[0]


def test_sections_of_quality_are_shown_when_there_are_any(tmp_path):
    cases = {
        "fine": case(expected_dice={"1": 0.95, "7": 0.91}, agreement={"1": 0.97, "7": 0.9}, similarity=0.876),
        "poor": case(expected_dice={"1": 0.41, "7": None}, agreement={"1": 0.5, "7": None}, similarity=0.2),
        "odd": case(flags=["odd one out"], expected_dice={"1": 0.93, "7": 0.9}),
        "warned": case(warnings=["nothing was found"], expected_dice={"1": 0.94, "7": 0.9}),
    }
    test = {"mean_dice": {"1": 0.8123, "7": 0.7}, "contexts": {"ctx": {"1": 0.8123, "7": 0.66}}, "worst": "ctx"}
    content = report(cases, self_test=test, failed={"lost": ["no 3D image", "really"]}, warnings=["context c is empty"])
    html = written(content, tmp_path)
    text = Page(html).text()
    for wanted in (
        "0.812",
        "Worst: ctx",
        "no 3D image; really",
        "context c is empty",
        "0.876",
        "odd one out",
        "0.410",
    ):
        assert wanted in text
    table = html[html.index("4 cases") :]
    order = [table.index(f"<th>{name}</th>") for name in ("odd", "warned", "poor", "fine")]
    assert order == sorted(order), "flags, then warnings, then the lowest expected Dice"
    assert len(re.findall('class="low"', table)) == 2, "expected Dice and agreement of one case"


def test_text_from_files_never_becomes_markup(tmp_path):
    nasty = "<script>alert(1)</script>\"'&javascript:\udcff"
    cases = {nasty.replace("/", ""): case(warnings=[nasty], flags=[nasty], contexts={"1": [nasty]})}
    page = Page(
        written(
            report(cases, contexts=[nasty], failed={nasty: [nasty]}, warnings=[nasty], device=nasty),
            tmp_path,
        )
    )
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(1)</script>" in page.text()


def test_the_page_needs_nothing_from_elsewhere_and_links_lead_to_the_pictures(tmp_path):
    name = "günther #1 100%"
    save_png(Image.new("RGB", (2000, 900), (200, 0, 0)), tmp_path / f"{name}.png")
    html = written(report({name: case(), "without": case()}), tmp_path)
    page = Page(html)
    links = [value for key, value in page.attributes if key == "href"]
    assert set(links) == {"g%C3%BCnther%20%231%20100%25.png"} and len(links) == 2
    (source,) = [value for key, value in page.attributes if key == "src"]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
    assert thumbnail.width == 640 and thumbnail.getpixel((10, 10))[0] > 150
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_thousands_of_cases_stay_bounded(tmp_path):
    cases = {f"c{i:05d}": case() for i in range(3000)} | {"zzz": case(flags=["odd"])}
    for name in [*list(cases)[: PICTURES + 20], "zzz"]:
        Image.new("RGB", (400, 200)).save(tmp_path / f"{name}.png")
    html = written(report(cases, failed={f"f{i}": ["x"] for i in range(2000)}), tmp_path)
    page = Page(html)
    assert page.tags.count("img") == PICTURES and page.tags.count("tr") < 2 * ROWS + 30
    assert "The first 1,000 of 3,001" in page.text() and f"The first {PICTURES} of {PICTURES + 21}" in page.text()
    assert html.index("overlay of zzz") < html.index("overlay of c00000")
    assert len(html) < 2e6


def test_a_damaged_picture_is_linked_but_not_shown(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    page = Page(written(report({"a": case()}), tmp_path))
    assert "img" not in page.tags and ("href", "a.png") in page.attributes


@pytest.mark.parametrize("finished", [True, False])
def test_an_unfinished_run_says_how_much_is_missing(tmp_path, finished):
    text = Page(written(report({"a": case()}, targets=5, finished=finished), tmp_path)).text()
    assert ("not done yet" in text) == (not finished)


def test_a_run_without_any_answer(tmp_path):
    assert "Failed targets" in Page(written(report({}, failed={"a": ["bad"]}), tmp_path)).text()
