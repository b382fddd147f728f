"""How many pairs fit."""

import pytest
import torch

from scripts.networks import Neuroverse3D
from scripts.runtime import host_memory, memory

CPU = torch.device("cpu")


def test_less_memory_means_fewer_pairs_at_once(monkeypatch):
    network = Neuroverse3D(channels=(16, 32), spatial_size=32)
    one = memory.map_bytes(network, (32, 32, 32))
    assert one == 16 * 32**3 * 4
    found = []
    for maps in (1, 8, 12, 1000):
        monkeypatch.setattr(memory, "free_memory", lambda _, m=maps: m * one)
        found.append(memory.fitting_pairs(network, (32, 32, 32), CPU))
    assert found == sorted(found) and found[0] == 1 and found[-1] == memory.MOST_PAIRS["cpu"] and len(set(found)) > 2


def test_a_container_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert memory.free_memory(CPU) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) > 10**7


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert memory.is_out_of_memory(error) is expected
