"""The pages against the code: no option is left out, none is made up, no link is dead."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from scripts.apps.bids.__main__ import APP_OPTIONS
from scripts.apps.command import option_tables
from scripts.corrupt import corrupt
from scripts.data import GroupAugmentation
from scripts.data.rows import Row
from scripts.data.tasks import TASKS
from scripts.prepare_data import prepare_data
from scripts.preview import preview
from scripts.runtime.options import OPTIONS, default_text

PAGES = (Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md")))
CODE = re.compile(r"```.*?```", re.DOTALL)


def read(page):
    return Path("docs", f"{page}.md").read_text(encoding="utf-8")


def rows_of(text, header):
    """First cells of the table under a header line that begins so."""
    lines = text[text.index(header) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def anchors(text):
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_options_is_what_make_docs_writes():
    assert read("options") == option_tables.page()


def test_the_page_of_options_has_every_option_of_every_workflow_and_tool():
    text = read("options")
    for name in ("inference", "tune", "evaluate", "train_stage1"):
        content = json.loads(Path(f"configs/{name}.json").read_text(encoding="utf-8"))
        section = text[text.index(f"`configs/{name}.json`") :].partition("\n## ")[0]
        named = rows_of(section, "| option |") | set(re.findall(r"`(\w+)`", section.partition("\nAs with ")[2]))
        assert named == set(content) & set(OPTIONS) - {"help", "debug"}
    for tool in (prepare_data, corrupt, preview):
        section = text[text.index(f"`python -m scripts.{tool.__name__}`") :]
        assert rows_of(section, "| option |") == set(inspect.signature(tool).parameters)
    assert rows_of(text[text.index("`neuroverse3d bids`") :], "| option |") == set(APP_OPTIONS)


def test_a_default_is_said_as_a_user_would_type_it():
    said = {
        ("output_dir", "$@bundle_root + '/eval'"): "eval",
        ("cache_dir", "$@output_dir + '/cache'"): "OUT/cache",
        ("labels", None): "all there are",
        ("device", "$local_device()"): "GPU, else CPU",
        ("context_size", 8): "8",
        ("augment", True): "true",
        ("amp", "auto"): "auto",
    }
    assert {key: default_text(*key) for key in said} == said


def test_the_augmentation_s_defaults_on_the_page_are_its_own():
    content = json.loads(Path("configs/train_stage1.json").read_text(encoding="utf-8"))
    defaults = {name: p.default for name, p in inspect.signature(GroupAugmentation).parameters.items()}
    assert {name: content[name] for name in defaults} == defaults and set(defaults) <= set(OPTIONS)


def test_every_task_and_every_key_of_a_row_is_explained():
    assert rows_of(read("training"), "| task | input | wanted output |") == set(TASKS)
    keys = read("options").partition("`--collection_file`")[2]
    assert rows_of(keys, "| option |") == {field.name for field in fields(Row)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_within_the_repository_lead_somewhere(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_bundle_commands_use_options_that_exist(page):
    for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for command in block.replace("\\\n", " ").splitlines():
            configs = re.findall(r"configs/(\w+)\.json", command.partition("monai.bundle run")[2])
            if not configs:
                continue
            known = {key for name in configs for key in json.loads(Path(f"configs/{name}.json").read_text())}
            used = re.findall(r" --([a-z]\w*)", command.partition("monai.bundle run")[2])
            assert set(used) - {"config_file", "tracking"} <= known, command
