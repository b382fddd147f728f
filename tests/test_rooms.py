"""The rooms of ``scripts`` (docs/architecture.md): each says what it may use, and its imports keep to it."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
ROOMS = sorted(path.parent.name for path in SCRIPTS.glob("*/__init__.py"))
DOORS_OF = {"inferer": "inference", "losses": "training"}
"""Documented import paths at the top that belong to a room; rooms use no other door."""
MOST_FILES_AT_THE_TOP = 15


def module_name(path, root):
    """Dotted name of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root=ROOT):
    """Module -> modules of ``scripts`` that it imports by name, wherever in the file, and in which line."""
    files = {module_name(path, root): path for path in sorted((root / "scripts").rglob("*.py"))}
    found = {}
    for name, path in files.items():
        used = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: give the whole path of what is imported"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [one if one in files else node.module for one in whole]
            else:
                continue
            used |= {one: node.lineno for one in names if one in files}
        found[name] = used
    return found


def room_of(module):
    """Room of a module; None for a door that belongs to none."""
    top = module.split(".")[1] if "." in module else ""
    return top if top in ROOMS else DOORS_OF.get(top)


def allowed(room):
    """Rooms that a room says it may use."""
    docstring = ast.get_docstring(ast.parse((SCRIPTS / room / "__init__.py").read_text(encoding="utf-8")))
    (said,) = re.findall(r"May use: ([\w, ]+)\.", docstring)
    assert re.search(r"\bIn: .+\bOut: ", docstring, re.DOTALL), f"{room}: what comes in, what goes out?"
    return set() if said == "no other room" else set(said.split(", "))


def circle(found):
    """Modules that import each other in a circle; none if there is no circle."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_those_that_it_says_and_no_other(room):
    may, used = allowed(room), set()
    for module, names in imports().items():
        if room_of(module) != room:
            continue
        for name, line in names.items():
            other = room_of(name)
            assert other is not None, f"{module}, line {line}: a room uses no door: {name}"
            assert other in may | {room}, f"{module}, line {line}: {room} may not use {other} ({name})"
            used.add(other)
    assert used - {room} == may, f"{room} says that it uses {may - used}, and does not"


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports()) == []


def test_rooms_use_each_other_in_one_direction():
    assert circle({room: allowed(room) for room in ROOMS}) == []


def test_at_the_top_are_few_files():
    assert len(list(SCRIPTS.glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"`{room}/`" not in page] == []


def test_a_circle_and_a_lazy_import_are_seen(tmp_path):
    (tmp_path / "scripts" / "room").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "a": "from scripts.room import b\n",
        "b": "def later():\n    import scripts.room.c\n",
        "c": "from scripts.room.a import x\n",
    }.items():
        (tmp_path / "scripts" / "room" / f"{name}.py").write_text(text)
    found = imports(tmp_path)
    assert found["scripts.room.b"] == {"scripts.room.c": 2}
    assert set(circle(found)) == {"scripts.room.a", "scripts.room.b", "scripts.room.c"}
    del found["scripts.room.b"]["scripts.room.c"]
    assert circle(found) == []
