"""Reading JSON that users give, and names and links of image files; both with random inputs, too."""

from __future__ import annotations

import json
import os
import random
import unicodedata

import pytest

from scripts.data.example_pairs import read_pair_list
from scripts.data.files import DatasetError, file_faults, image_files, printable, read_json
from scripts.data.nnunet import NnunetDataset, find_targets
from scripts.data.rows import read_rows
from scripts.data.splits import read_split

CONTENT = {"labels": {"background": 0, "größe": 1}, "list": [1, 2.5, None, True, "a\nb"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_of_json_is_read(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(CONTENT, ensure_ascii=False).encode(encoding))
    assert read_json(path, dict, "form") == CONTENT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \n", "the file is empty"),
        (b'{"a": 1,\n "b": }', "line 2: Expecting value"),
        (b'{"a": 1,\n\n "b": "caf\xe9"}', "line 3: no UTF-8 text"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', 'key "c" twice'),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1} {"b": 2}', "line 1: Extra data"),
        (b"[1]", "a list .* where an object .* belongs"),
        (b"3", "a number where an object"),
        (b"null", "null where an object"),
        (b"[" * 100000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_faults_are_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"a\.json cannot be read as JSON \(.*{reason}.*\): form$") as caught:
        read_json(path, dict, "form")
    assert len(str(caught.value).splitlines()) == 1


def damaged(rng: random.Random, text: bytes) -> bytes:
    """The text with bytes cut out, doubled, replaced or added, or with another encoding."""
    data = bytearray(text)
    for _ in range(rng.randint(0, 3)):
        place, length = rng.randrange(len(data) + 1), rng.randint(0, 6)
        change = rng.randrange(5)
        if change == 0:
            del data[place : place + length]
        elif change == 1:
            data[place:place] = data[place : place + length]
        elif change == 2:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif change == 3:
            data[place:place] = rng.choice(
                [b"\xef\xbb\xbf", b"NaN", b"null", b"{}", b"[", b"\x00", b"1e999", b"-1", b"\xff"]
            )
        else:
            data = data[:place]
        data = data or bytearray(b" ")
    return rng.choice([b"", b"", b"\xef\xbb\xbf"]) + bytes(data)


def test_damaged_json_is_read_or_named(make_dataset, tmp_path):
    """1200 files, through each reader in turn: what is read is whole, all else is a named fault in one line."""
    rng = random.Random(0)
    root = make_dataset(tmp_path, cases=["c0", "c1"], size=(8, 8, 8))
    cases = [{"dataset": root.name, "case": case} for case in ("c0", "c1")]
    split = {"train": {root.name: ["c0"]}, "val": {root.name: ["c1"]}, "test": {}}
    readers = {
        "dataset.json": (json.loads((root / "dataset.json").read_text()), lambda path: NnunetDataset.read(path.parent)),
        "splits.json": (split, lambda path: read_split(path, cases)),
        "splits_final.json": ([{"train": ["c0"], "val": ["c1"]}], lambda path: read_split(path, cases, 0)),
        "rows.json": ({"rows": [{"dataset": "D", "input": [0]}]}, read_rows),
        "pairs.json": ({"training": [{"image": "a.nii", "label": "b.nii"}]}, read_pair_list),
    }
    found = {"read": 0, "named": 0}
    for number in range(1200):
        name = list(readers)[number % len(readers)]
        content, read = readers[name]
        path = root / name
        path.write_bytes(damaged(rng, json.dumps(content, indent=1).encode()))
        try:
            read(path)
            found["read"] += 1
        except DatasetError as error:
            assert name in str(error) and len(str(error).splitlines()) == 1, error
            found["named"] += 1
    print(found)
    assert min(found.values()) > 100


def random_names(count: int) -> list[bytes]:
    """File names without ending, as bytes: spaces, other scripts, marks of shells and parsers, no UTF-8."""
    rng = random.Random(1)
    pieces = [*"abcXYZ019 -_.,;:+=~!()[]{}&'\"`$@%#^*?|<>\\\t\n", *"éßøñ病例Ωж🧠\u0301\u202e\u00a0", "_0000", "sub-1"]
    names = set()
    while len(names) < count:
        name = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12))).encode()
        name = rng.choice([b"", b"", b"-", b"--", b".", b"$", b"@", b"%"]) + name
        if rng.random() < 0.15:
            place = rng.randrange(len(name) + 1)
            name = name[:place] + bytes([rng.randrange(0x80, 0x100)]) + name[place:]
        names.add(name)
    return sorted(names)


def test_any_file_name_is_a_target_or_a_named_fault(tmp_path):
    """600 names: each visible file is found once, under a printable name; those that are not UTF-8 are faults."""
    names = random_names(600)
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name + b".nii.gz"), "wb"):
            pass
    visible = [name for name in names if not name.startswith(b".")]
    found = find_targets(tmp_path)
    assert sorted(os.fsencode(t["image"]) for t in found) == sorted(
        os.path.join(os.fsencode(tmp_path), name + b".nii.gz") for name in visible
    )
    faulty = [target for target in found if target.get("folder_problems")]
    for target in found:
        target["case"].encode("utf-8")
    assert all("not UTF-8" in target["folder_problems"][0] for target in faulty)
    broken = [name for name in visible if printable(os.fsdecode(name)) != os.fsdecode(name)]
    print(len(visible), "visible names,", len(faulty), "of them not UTF-8")
    assert len(faulty) == len(broken) > 20
    assert {t["case"] for t in found if t not in faulty} == {n.decode() for n in visible if n not in broken}


def test_links_to_nothing_are_files_with_a_fault(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (tmp_path / "b.nii.gz").symlink_to("../.git/annex/objects/none/b.nii.gz")
    (tmp_path / "c.nii.gz").symlink_to("a.nii.gz")
    (tmp_path / "d.nii.gz").symlink_to("d.nii.gz")  # to itself
    (tmp_path / "e.nii.gz").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz"]
    faults = {path.name: file_faults(path) for path in image_files(tmp_path)}
    assert [name for name, texts in faults.items() if texts] == ["b.nii.gz", "d.nii.gz"]
    assert "datalad get" in faults["b.nii.gz"][0]
    assert image_files(tmp_path / "nowhere") == []


def test_a_name_stays_what_it_is(tmp_path):
    for form in ("NFC", "NFD"):
        assert printable(unicodedata.normalize(form, "Zoë 病例 🧠")) == unicodedata.normalize(form, "Zoë 病例 🧠")
    assert printable(os.fsdecode(b"a\xff")) == "a\\udcff"
