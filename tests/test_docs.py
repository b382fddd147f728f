"""The pages against the code: no option is left out, none is made up, no link is dead."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from scripts.corrupt import corrupt
from scripts.data import GroupAugmentation
from scripts.data.rows import Row
from scripts.data.tasks import TASKS
from scripts.prepare_data import prepare_data
from scripts.preview import preview
from scripts.runtime.options import OPTIONS

PAGES = (Path("README.md"), *sorted(Path("docs").glob("*.md")))
PAGE_OF = {
    "train_stage1": "training",
    "train_stage2": "training",
    "inference": "inference",
    "tune": "tuning",
    "evaluate": "inference",
}
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


@pytest.mark.parametrize(
    ("config", "header"),
    [
        ("train_stage1", "| option | stage 1 | stage 2 |"),
        ("train_stage2", "| option | stage 1 | stage 2 |"),
        ("inference", "| option | default | meaning |\n|---|---|---|\n| `dataset_dir` | – | targets |"),
        ("tune", "| option | default | meaning |"),
        ("evaluate", "| option | default | meaning |\n|---|---|---|\n| `prediction_dir`"),
    ],
)
def test_every_option_of_a_workflow_has_a_row_and_every_row_an_option(config, header):
    content = json.loads(Path(f"configs/{config}.json").read_text(encoding="utf-8"))
    assert rows_of(read(PAGE_OF[config]), header) == set(content) & set(OPTIONS)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_defaults_in_the_training_table_are_those_of_the_configurations(stage):
    content = json.loads(Path(f"configs/train_stage{stage}.json").read_text(encoding="utf-8"))
    text = read("training")
    wrong, compared = [], 0
    for line in text[text.index("| option | stage 1 | stage 2 |") :].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]):
            value = content[name]
            if isinstance(value, (int, float, list)):  # words stand for what is worked out or left open
                compared += 1
                said = json.loads(cells[stage].strip("`"))
                wrong += [(name, said, value)] if said != value else []
    assert compared > 40 and not wrong


def test_the_augmentation_table_is_complete_and_true():
    table = read("training").split("| option | probability | change |")[1].split("\n\n")[0]
    said = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", table, re.MULTILINE)}
    assert said == {name: p.default for name, p in inspect.signature(GroupAugmentation).parameters.items()}


def test_every_task_and_every_key_of_a_row_is_explained():
    text = read("training")
    assert rows_of(text, "| task | input | wanted output |") == set(TASKS)
    assert rows_of(text, "| key | default | meaning |") == {field.name for field in fields(Row)}


def test_command_line_tools_are_explained():
    assert rows_of(read("inference"), "| option of `scripts.corrupt` |") == set(inspect.signature(corrupt).parameters)
    previewed = rows_of(read("training"), "| option of `scripts.preview` |")
    assert previewed == set(inspect.signature(preview).parameters)
    options = read("data").split("## Options")[1]
    assert rows_of(options, "| option | default | meaning |") == set(inspect.signature(prepare_data).parameters)


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
