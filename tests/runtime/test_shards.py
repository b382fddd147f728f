"""Which part of the targets a process takes."""

import pytest

from scripts.runtime.shards import Shard, this_shard


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_the_parts_are_all_there_is_without_repetition_and_of_like_size(count):
    items = list(range(17))
    parts = [Shard(number, count).of(items) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_first_of_one_is_everything():
    assert this_shard() == (1, 1) and this_shard("3/16") == (3, 16) and this_shard(" 3 / 16") == (3, 16)


def test_processes_of_torchrun_share_the_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    taken = []
    for number in (1, 2):
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            taken.append(this_shard(f"{number}/2"))
    assert taken == [(number, 8) for number in range(1, 9)]
    monkeypatch.setenv("RANK", "2")
    assert this_shard() == (3, 4)


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "3/0", "a/b", "1/2/3", "-1/4", 0.5])
def test_parts_that_make_no_sense(text):
    with pytest.raises(ValueError, match="--shard takes a part and the number of parts"):
        this_shard(text)
