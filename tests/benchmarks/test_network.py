"""Every benchmark of speed and memory runs at tiny sizes and says what it should; no figure is held against a clock."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigWorkflow

from benchmarks import baseline_network, loading, network, training
from benchmarks.measure import FIGURES
from benchmarks.network import BFLOAT16, PeakMemory, convolution_values, forward_flops, forward_pass

COMPARISONS = [network.forward, network.contexts, network.labels, network.volume, training.step, loading.groups]


@pytest.mark.parametrize("benchmark", COMPARISONS, ids=lambda one: one.__name__)
def test_a_comparison_gives_time_memory_and_ratios(benchmark, rows):
    sides = {}
    for row in rows(benchmark):
        assert row.case and row.data and row.figures.keys() <= FIGURES.keys()
        sides.setdefault(row.case, {})[row.side] = row.figures
    for found in sides.values():
        assert {"baseline", "ours"} <= found.keys() and "speedup" not in found["baseline"]
        for side, figures in found.items():
            wanted = {"seconds", "peak_mib"} | ({"speedup", "memory"} if side.startswith("ours") else set())
            assert side == "matrix product" or all(figures[name] > 0 for name in wanted)
    if benchmark is network.forward:
        assert found[BFLOAT16]["of_float32"] == found[BFLOAT16]["peak_mib"] / found["ours"]["peak_mib"]
        assert found["ours"]["share_of_matrix_product"] > 0 and found["matrix product"].keys() == {"gflops"}


def test_sides_that_differ_are_found_out(rows, monkeypatch):
    monkeypatch.setattr(baseline_network.Fusion, "forward", lambda self, context, target, added_to: added_to)
    with pytest.raises(ValueError, match="ours and baseline do not compute the same"):
        rows(network.forward)


def test_growth_of_memory_is_stated_with_the_contexts_on_disk(rows):
    least, most = rows(network.memory)
    assert (least.side, most.side) == ("L=2", "L=4")
    assert most.figures["growth"] == pytest.approx(most.figures["peak_mib"] / least.figures["peak_mib"] - 1)


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory("cpu") as memory:
        for _ in range(20):
            block = torch.ones(16 * 2**20)  # 64 MiB
            del block
    assert memory.peak_mib - memory.before_mib > 48


def test_waiting_for_the_loader_is_a_share(rows):
    waiting = {row.side: row.figures["waiting_share"] for row in rows(loading.wait)}
    assert waiting["loader alone"] > 0.9 and waiting["training alone"] < 0.1 and 0 < waiting["together"] < 1


def test_the_full_network_is_as_much_work_as_the_description_says():
    full = (32, 64, 128, 256, 512)
    giga = [forward_flops(full, 128, pairs) / 2e9 for pairs in (1, 2)]
    assert giga[1] - giga[0] == pytest.approx(527, rel=0.01)  # multiply-adds of a pair
    assert giga[0] == pytest.approx(643 + 527, rel=0.01)
    # one convolution by hand: the target's embedding reads the volume and its weights, and writes 32 maps
    assert convolution_values(full, 128, 1) > 33 * 128**3
    assert convolution_values(full, 128, 3) - convolution_values(full, 128, 2) < convolution_values(full, 128, 2)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bfloat16, got 'float8'"):
        forward_pass("ours", (2, 4), 8, 1, 1, "cpu", precision="float8")


def called_network(config, monkeypatch, **options):
    """Whether a workflow reaches its network."""
    seen = []
    workflow = ConfigWorkflow(config, workflow_type="infer", **options)
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    name = "encode_target" if hasattr(network, "encode_target") else "forward"
    method = getattr(network, name)
    monkeypatch.setattr(network, name, lambda *inputs: seen.append(True) or method(*inputs))
    workflow.run()
    return bool(seen)


def test_both_bundles_of_the_start_up_reach_the_network(tmp_path, monkeypatch):
    data = loading.make_scene(tmp_path)
    image = data / "imagesTr" / "case_0_0000.nii.gz"
    assert called_network(str(tmp_path / "stock.json"), monkeypatch, bundle_root=".", image=str(image))
    paths = {"dataset_dir": str(data), "context_dir": str(data), "output_dir": str(tmp_path / "answers")}
    paths |= {"checkpoint": str(tmp_path / "model.pt"), "device": "cpu"}
    assert called_network("configs/inference.json", monkeypatch, **paths)


def test_a_start_that_never_gets_there_says_why(tmp_path):
    loading.make_scene(tmp_path)
    with pytest.raises(ValueError, match="before its first step: "):
        loading.until_first_call(f"--config_file {tmp_path}/nothing.json --bundle_root .")
