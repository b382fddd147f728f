"""Labels -> segments of a DICOM segmentation, with names and codes.

Codes come from a file in the form of dcmqi, as 3D Slicer and dcmqi read and write it: ``segmentAttributes`` holds
``labelID``, ``SegmentLabel``, ``SegmentedPropertyCategoryCodeSequence``, ``SegmentedPropertyTypeCodeSequence`` and
perhaps ``AnatomicRegionSequence`` (https://github.com/QIICR/dcmqi). A label without an entry gets a private code: no
anatomy is guessed from a name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.data.files import DatasetError, read_json

logger = logging.getLogger(__name__)

PRIVATE_SCHEME = "99NEUROVERSE3D"
"""Coding scheme of labels without a standard code; DICOM has private schemes begin with 99."""

_MAX_SEGMENTS = 2**16 - 1  # a segment's number is an unsigned short
_TEXT_LENGTH, _CODE_LENGTH = 64, 16  # of DICOM's LO and SH
_ATTRIBUTES = "segmentAttributes"


class Coded(NamedTuple):
    """A coded concept: CodeValue, CodingSchemeDesignator, CodeMeaning."""

    value: str
    scheme: str
    meaning: str


ANATOMICAL_STRUCTURE = Coded("91723000", "SCT", "Anatomical Structure")
"""Category of labels without a standard code."""


class Segment(NamedTuple):
    """One segment: the label number that it stands for, its name, and what is known of its kind and place."""

    label: int
    name: str
    category: Coded
    kind: Coded
    region: Coded | None = None


def describe_segments(
    labels: Sequence[int], names: Mapping[int, str], codes_file: str | Path | None = None
) -> list[Segment]:
    """What the segments 1, 2, ... of a prediction are.

    Args:
        labels: label numbers, one per segment; any positive numbers.
        names: by label number; others are called "label N".
        codes_file: dcmqi's JSON, whose ``labelID`` is the label number; None gives all labels private codes.

    Raises:
        ValueError: more segments than DICOM can number, or a faulty file.
    """
    if len(labels) > _MAX_SEGMENTS:
        raise ValueError(f"a DICOM segmentation has at most {_MAX_SEGMENTS} segments, the contexts have {len(labels)}")
    coded = {} if codes_file is None else _read_codes(Path(codes_file))
    without = [label for label in labels if label not in coded]
    if without:
        shown = ", ".join(map(str, without[:10])) + (" ..." if len(without) > 10 else "")
        logger.warning("no standard codes for labels %s: private codes are written", shown)
    segments = []
    for label in labels:
        name = _text(names.get(label, f"label {label}"))
        private = Segment(label, name, ANATOMICAL_STRUCTURE, Coded(str(label), PRIVATE_SCHEME, name))
        segments.append(coded[label]._replace(name=coded[label].name or name) if label in coded else private)
    return segments


def _read_codes(path: Path) -> dict[int, Segment]:
    try:
        groups = read_json(path, dict, "expected dcmqi's form", "is not in dcmqi's form")[_ATTRIBUTES]
        entries = [entry for group in groups for entry in (group if isinstance(group, list) else [group])]
        found = [_read_entry(entry) for entry in entries]
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]}; it must be in dcmqi's form") from error
    except DatasetError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in dcmqi's form ({error})") from error
    twice = sorted({segment.label for segment in found if sum(segment.label == s.label for s in found) > 1})
    if twice:
        raise ValueError(f"{path}: several entries with labelID {', '.join(map(str, twice))}")
    return {segment.label: segment for segment in found}


def _read_entry(entry: Mapping[str, Any]) -> Segment:
    name = entry.get("SegmentLabel") or entry.get("SegmentDescription") or ""
    return Segment(
        int(entry["labelID"]),
        _text(name),
        _read_code(entry["SegmentedPropertyCategoryCodeSequence"]),
        _read_code(entry["SegmentedPropertyTypeCodeSequence"]),
        _read_code(entry["AnatomicRegionSequence"]) if "AnatomicRegionSequence" in entry else None,
    )


def _read_code(content: Mapping[str, str]) -> Coded:
    code = Coded(str(content["CodeValue"]), str(content["CodingSchemeDesignator"]), _text(content["CodeMeaning"]))
    if not all(code) or max(len(code.value), len(code.scheme)) > _CODE_LENGTH:
        raise ValueError(f"no code: {', '.join(code)}")
    return code


def _text(text: str) -> str:
    """As DICOM's LO takes it: a backslash would separate values."""
    return text.replace("\\", "/").strip()[:_TEXT_LENGTH]
