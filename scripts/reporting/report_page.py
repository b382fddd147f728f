"""One HTML page per run for the people who check its predictions: what was run, table, pictures, what needs a look.

The page is one file that needs no network and no scripts. It stays small over thousands of cases: cases that need a
look come first, then those of lowest expected Dice; the first 1,000 have a row and the first 60 a picture in the page.
All others are in ``report.json`` and ``volumes.csv``, and every case has its own picture file.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from scripts.reporting.pictures import label_colour
from scripts.runtime.output_folder import write_text

logger = logging.getLogger(__name__)

PAGE = "report.html"
ROWS = 1000
PICTURES = 60
PICTURE_PX = 640
LOW_DICE = 0.7
"""Dice below this is marked: above it overlap is commonly called good, after Zijdenbos et al. 1994."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1d22; background: #fff;
  margin: 0 auto; padding: 24px 32px 64px; max-width: 1400px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p { margin: 6px 0; max-width: 80ch; } .quiet { color: #62646e; } a { color: #0b57a4; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { border: 1px solid #d9dbe1; border-radius: 8px; padding: 8px 16px; min-width: 90px; }
.tile b { display: block; font-size: 22px; } .tile.bad { border-color: #b3261e; color: #b3261e; }
.scroll { overflow-x: auto; border: 1px solid #d9dbe1; border-radius: 8px; max-height: 80vh; width: fit-content;
  max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceef2; }
thead th { position: sticky; top: 0; background: #f4f5f8; z-index: 1; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead tr > :first-child { background: #f4f5f8; z-index: 2; }
td.text, th.text { text-align: left; white-space: normal; min-width: 260px; max-width: 640px;
  overflow-wrap: anywhere; }
td.name, th.name { text-align: left; }
tbody th { font-weight: 600; } .low { background: #fde7e4; color: #8c1d18; } .flag { color: #8c1d18; }
tr:last-child > * { border-bottom: 0; }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  border: 1px solid #0003; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%), 1fr)); gap: 18px; }
figure { margin: 0; border: 1px solid #d9dbe1; border-radius: 8px; overflow: hidden; break-inside: avoid; }
figure img { display: block; width: 100%; background: #101012; }
figcaption { padding: 8px 12px; overflow-wrap: anywhere; }
@media print { .scroll { overflow: visible; max-height: none; } body { max-width: none; padding: 0; } }
"""

Element = ET.Element
Child = Element | str | None


def write_page(
    report: Mapping[str, Any], folder: str | os.PathLike, page: str = PAGE, pictures: str = "", title: str | None = None
) -> None:
    """Write ``report.html`` beside the predictions.

    Args:
        report: content of ``report.json``.
        folder: the run's output folder.
        page: the file's name.
        pictures: what is in front of the pictures' names ``CASE.png``, such as ``figures/``.
        title: of the page; None names the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    cases = sorted(report["cases"].items(), key=_urgency)
    labels = [str(label) for label in report["labels"]] if report["task"] == "segmentation" else []
    failed = report["failed"]
    title = title or f"Inference report, {folder.absolute().name}"
    body = _tag(
        "body",
        _tag("h1", title),
        _tag(
            "p", "For research use only. Every prediction needs a look by somebody who knows the anatomy.", cls="quiet"
        ),
        _tiles(report),
        *_what_was_run(report),
        *_lists("Failed targets", failed, "These have no prediction. The same command tries them again."),
        *_lists("Warnings about the contexts", {"": report["warnings"]} if report.get("warnings") else {}),
        *_self_test(report, labels),
        *_label_summary(cases, labels),
        *_case_table(cases, labels, folder, pictures),
        *_gallery(cases, folder, pictures),
    )
    head = _tag("head", _tag("title", title), _tag("style", _STYLE))
    head.insert(0, Element("meta", charset="utf-8"))
    head.insert(1, Element("meta", name="viewport", content="width=device-width, initial-scale=1"))
    root = _tag("html", head, body)
    root.set("lang", "en")
    # a tree, so that names from files cannot become markup; ASCII, so that any byte in them can be written
    text = ET.tostring(root, encoding="us-ascii", method="html").decode()
    write_text("<!DOCTYPE html>\n" + text + "\n", folder / page)


def _urgency(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, bool, float, str]:
    """Flagged cases first, then those with warnings, then by lowest expected Dice."""
    name, entry = item
    expected = [dice for dice in entry.get("expected_dice", {}).values() if dice is not None]
    return not entry.get("flags"), not entry.get("warnings"), min(expected, default=1.0), name


def _tiles(report: Mapping[str, Any]) -> Element:
    cases = report["cases"].values()
    flagged = sum(bool(case.get("flags")) for case in cases)
    warned = sum(bool(case.get("warnings")) for case in cases)
    seconds = [case["seconds"] for case in cases]
    tiles = [("done", len(seconds), False), ("failed", len(report["failed"]), bool(report["failed"]))]
    missing = report.get("targets", 0) - len(seconds) - len(report["failed"])
    if not report.get("finished", True):
        tiles.append(("not done yet", max(missing, 0), True))
    tiles += [("flagged", flagged, bool(flagged))] if any("flags" in case for case in cases) else []
    tiles += [("with warnings", warned, False)]
    tiles += [("per case (median)", _duration(statistics.median(seconds)), False)] if seconds else []
    return _tag(
        "div",
        *(_tag("div", _tag("b", _text(value)), name, cls="tile bad" if bad else "tile") for name, value, bad in tiles),
        cls="tiles",
    )


def _what_was_run(report: Mapping[str, Any]) -> list[Element]:
    weights, contexts = report.get("weights", {}), report["contexts"]
    memory = [case["peak_memory_mb"] for case in report["cases"].values() if case.get("peak_memory_mb")]
    facts = {
        "task": report["task"],
        "labels": ", ".join(map(str, report["labels"])) if report["task"] == "segmentation" else None,
        f"contexts ({len(contexts)})": ", ".join(contexts),
        "weights": f"{weights.get('file')}, SHA-256 {weights.get('sha256')}" if weights else None,
        "grid": f"{report['spacing_mm']:.3g} mm voxels",
        **report.get("settings", {}),
        "device": report.get("device"),
        "shards": report.get("shards"),
        "time of all cases": _duration(sum(case["seconds"] for case in report["cases"].values())),
        "peak memory": f"{max(memory):,.0f} MB" if memory else None,
        "started": report.get("started"),
        "fingerprint of contexts, weights and settings": report["fingerprint"],
    }
    rows = [
        [_tag("th", name), _tag("td", _text(value), cls="text")] for name, value in facts.items() if value is not None
    ]
    return [_tag("h2", "What was run"), _table([], rows)]


def _lists(title: str, reasons: Mapping[str, list[str]], note: str = "") -> list[Element]:
    if not reasons:
        return []
    rows = [
        [_tag("th", name or f"{len(why)}"), _tag("td", "; ".join(map(str, why)), cls="text")]
        for name, why in list(reasons.items())[:ROWS]
    ]
    more = f" The first {ROWS} of {len(reasons)}; all are in report.json." if len(reasons) > ROWS else ""
    return [_tag("h2", title), _tag("p", note + more, cls="quiet"), _table([], rows)]


def _self_test(report: Mapping[str, Any], labels: list[str]) -> list[Element]:
    test = report.get("self_test")
    if not test or not test.get("contexts"):
        return []
    rows = [
        [_tag("th", name), *(_dice(scores.get(label)) for label in labels)] for name, scores in test["contexts"].items()
    ]
    rows.append([_tag("th", "mean"), *(_dice(test.get("mean_dice", {}).get(label)) for label in labels)])
    text = "Dice of every context, predicted from the others: what to expect of targets that look like them."
    worst = f" Worst: {test['worst']}; its label may be wrong." if test.get("worst") else ""
    head = [_tag("th", "context"), *(_label_head(label) for label in labels)]
    return [_tag("h2", "Self-test of the contexts"), _tag("p", text + worst), _table(head, rows)]


def _label_summary(cases: list[tuple[str, Mapping[str, Any]]], labels: list[str]) -> list[Element]:
    """Volumes over all cases, where an odd one stands out as minimum or maximum."""
    rows = []
    for label in labels:
        found = [(entry["volumes_mm3"][label], name) for name, entry in cases if label in entry["volumes_mm3"]]
        if not found:
            continue
        volumes = [volume for volume, _ in found]
        low, high = min(found), max(found)
        expected = [e["expected_dice"][label] for _, e in cases if e.get("expected_dice", {}).get(label) is not None]
        rows.append(
            [
                _tag("th", _chip(label), label),
                _number(statistics.mean(volumes)),
                _number(statistics.stdev(volumes) if len(volumes) > 1 else None),
                _number(low[0]),
                _tag("td", low[1], cls="name"),
                _number(high[0]),
                _tag("td", high[1], cls="name"),
                _tag("td", str(sum(volume == 0 for volume in volumes))),
                *([_dice(statistics.mean(expected))] if expected else []),
            ]
        )
    if not rows:
        return []
    names = ["label", "mean mm³", "SD mm³", "smallest mm³", "in case", "largest mm³", "in case", "empty in"]
    names += ["mean expected Dice"] if any(len(row) > len(names) for row in rows) else []
    head = [_tag("th", name, cls="name" if name == "in case" else None) for name in names]
    return [_tag("h2", f"Volumes over {len(cases):,} cases"), _table(head, rows)]


def _case_table(
    cases: list[tuple[str, Mapping[str, Any]]], labels: list[str], folder: Path, pictures: str
) -> list[Element]:
    if not cases:
        return []
    shown = cases[:ROWS]
    groups = [
        (title, key, cell)
        for title, key, cell in (
            ("mm³", "volumes_mm3", _number),
            ("expected Dice", "expected_dice", _dice),
            ("agreement", "agreement", _dice),
        )
        if any(entry.get(key) for _, entry in shown)
    ]
    similar = any(entry.get("similarity") is not None for _, entry in shown)
    aligned = any(entry.get("alignment") for _, entry in shown)
    head = [_tag("th", "case"), _tag("th", "flags and warnings", cls="text")]
    head += [_label_head(label, title) for title, _, _ in groups for label in labels]
    head += [_tag("th", "similarity")] if similar else []
    head += [_tag("th", "aligned contexts", cls="text")] if aligned else []
    head += [_tag("th", "seconds")]
    rows = []
    for name, entry in shown:
        picture = f"{pictures}{name}.png"
        row = [
            _tag("th", _link(picture, name) if (folder / picture).is_file() else name),
            _tag("td", *_remarks(entry), cls="text"),
            *(cell(entry.get(key, {}).get(label)) for _, key, cell in groups for label in labels),
        ]
        row += [_tag("td", _decimal(entry.get("similarity")))] if similar else []
        row += [_aligned(entry.get("alignment"))] if aligned else []
        rows.append([*row, _tag("td", f"{entry['seconds']:.1f}")])
    note = "Cases that need a look come first: flagged ones, then those with warnings, then the lowest expected Dice."
    more = f" The first {ROWS:,} of {len(cases):,}; all are in report.json and volumes.csv."
    note += more if len(cases) > ROWS else ""
    return [_tag("h2", f"{len(cases):,} cases"), _tag("p", note, cls="quiet"), _table(head, rows)]


def _gallery(cases: list[tuple[str, Mapping[str, Any]]], folder: Path, pictures: str) -> list[Element]:
    pictured = [(name, entry) for name, entry in cases if (folder / f"{pictures}{name}.png").is_file()]
    if not pictured:
        return []
    figures = []
    for name, entry in pictured[:PICTURES]:
        used = list(dict.fromkeys(context for names in entry.get("contexts", {}).values() for context in names))
        caption = [_tag("b", name), *([": "] if _remarks(entry) else []), *_remarks(entry)]
        caption.append(_tag("div", "contexts: " + (", ".join(used) or "none"), cls="quiet"))
        shown = _thumbnail(folder / f"{pictures}{name}.png", name)
        figures.append(_tag("figure", _link(f"{pictures}{name}.png", shown), _tag("figcaption", *caption)))
    note = "Patient's right is on the picture's left. A click opens the full picture."
    more = f" The first {PICTURES} of {len(pictured):,} in the order of the table; the others open from there."
    note += more if len(pictured) > PICTURES else ""
    return [_tag("h2", "Pictures"), _tag("p", note, cls="quiet"), _tag("div", *figures, cls="gallery")]


def _thumbnail(path: Path, name: str) -> Child:
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except OSError as error:
        logger.warning("%s is not shown in %s: %s", path.name, PAGE, error)
        return path.name
    small.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return Element("img", src=source, alt=f"overlay of {name}", width=str(small.width), height=str(small.height))


def _remarks(entry: Mapping[str, Any]) -> list[Child]:
    flags, warnings = entry.get("flags") or [], entry.get("warnings") or []
    found: list[Child] = [_tag("span", "; ".join(map(str, flags)), cls="flag")] if flags else []
    found += ["; "] if flags and warnings else []
    return found + (["; ".join(map(str, warnings))] if warnings else [])


def _table(head: list[Element], rows: Iterable[list[Element]]) -> Element:
    parts = [_tag("thead", _tag("tr", *head))] if head else []
    return _tag(
        "div", _tag("table", *parts, _tag("tbody", *(_tag("tr", *row) for row in rows))), cls="scroll"
    )  # fmt: skip


def _label_head(label: str, title: str = "") -> Element:
    return _tag("th", _chip(label), f"{label} {title}".strip())


def _chip(label: str) -> Element:
    chip = Element("span", style=f"background:#{bytes(label_colour(int(label))).hex()}")
    chip.set("class", "chip")
    return chip


def _dice(value: float | None) -> Element:
    return _tag("td", _decimal(value), cls="low" if value is not None and value < LOW_DICE else None)


def _aligned(alignment: Mapping[str, Any] | None) -> Element:
    """How many contexts were aligned, and how alike they are after it; their transforms in words on hovering."""
    alignment = alignment or {}
    contexts, left_out = alignment.get("contexts", {}), alignment.get("left_out", [])
    if not contexts:
        return _tag("td", "none" if alignment else "–", cls="low text" if alignment else "text")
    alike = [found["similarity"] for found in contexts.values()]
    text = f"{len(contexts)} of {len(contexts) + len(left_out)}, similarity {min(alike):.2f} to {max(alike):.2f}"
    cell = _tag("td", text, cls="text")
    lines = [f"{name}: {found['similarity']:.2f}, {found['transform']}" for name, found in contexts.items()]
    cell.set("title", "\n".join([*lines, *(f"{name}: left out" for name in left_out)]))
    return cell


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _number(value: float | None) -> Element:
    return _tag("td", "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,.1f}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds / 60), 60)[::-1]
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _link(file: str, shown: Child) -> Element:
    link = _tag("a", shown)
    link.set("href", quote(os.fsencode(file)))
    return link


def _tag(name: str, *children: Child, cls: str | None = None) -> Element:
    """An element with text and elements in it."""
    element = Element(name, {"class": cls} if cls else {})
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + child
            else:
                element.text = (element.text or "") + child
        elif child is not None:
            element.append(child)
    return element
