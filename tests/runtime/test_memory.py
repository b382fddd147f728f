"""How much memory is free, and what says that it ran out."""

import pytest
import torch

from scripts.runtime import memory

CPU = torch.device("cpu")


def test_a_container_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
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
