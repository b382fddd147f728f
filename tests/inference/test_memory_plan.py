"""How many pairs fit."""

import torch

from scripts.inference import memory_plan
from scripts.networks import Neuroverse3D

CPU = torch.device("cpu")


def test_less_memory_means_fewer_pairs_at_once(monkeypatch):
    network = Neuroverse3D(channels=(16, 32), spatial_size=32)
    one = memory_plan.map_bytes(network, (32, 32, 32))
    assert one == 16 * 32**3 * 4
    found = []
    for maps in (1, 8, 12, 1000):
        monkeypatch.setattr(memory_plan, "free_memory", lambda _, m=maps: m * one)
        found.append(memory_plan.fitting_pairs(network, (32, 32, 32), CPU))
    assert found == sorted(found) and len(set(found)) > 2
    assert found[0] == 1 and found[-1] == memory_plan.MOST_PAIRS["cpu"]
