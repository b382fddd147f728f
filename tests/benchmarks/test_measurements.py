"""Every benchmark runs at tiny sizes, and says what it should say; no figure is held against a clock."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from monai.bundle import ConfigWorkflow

from benchmarks import bfloat16_dice, startup
from benchmarks.flat_memory import PeakMemory
from benchmarks.passes import forward_flops, forward_pass
from benchmarks.volume_time import convolution_values

pytestmark = pytest.mark.usefixtures("measured_here")

NETWORKS = ["forward", "many_labels", "training_step", "context_curve", "volume_time"]


@pytest.mark.parametrize("name", [*NETWORKS, "bfloat16_memory", "data_path"])
def test_a_comparison_gives_time_memory_and_ratios(name, records):
    for record in records(getattr(import_module(f"benchmarks.{name}"), name)):
        assert record["benchmark"] == name and record["case"]
        assert {"baseline"} < record["sides"].keys()
        for figures in record["sides"].values():
            assert figures["peak_mib"] > 0 and figures.get("seconds", 1) > 0
        assert all(ratios["speedup"] > 0 and ratios["memory"] > 0 for ratios in record["ratios"].values())
        assert record["ratios"].keys() == record["sides"].keys() - {"baseline", "matrix product"}


def test_sides_that_differ_are_found_out(records, monkeypatch):
    from benchmarks import baseline_network

    monkeypatch.setattr(baseline_network.Fusion, "forward", lambda self, context, target, added_to: added_to)
    with pytest.raises(ValueError, match="ours and baseline do not compute the same"):
        records(import_module("benchmarks.forward").forward)


def test_growth_of_memory_is_stated_with_the_contexts_on_disk(records):
    (record,) = records(import_module("benchmarks.flat_memory").flat_memory)
    least, most = record["sides"].values()
    assert list(record["sides"]) == ["L=2", "L=4"]
    assert record["peak_growth"] == pytest.approx(most["peak_mib"] / least["peak_mib"] - 1)


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory("cpu") as memory:
        for _ in range(20):
            block = torch.ones(16 * 2**20)  # 64 MiB
            del block
    assert memory.peak_mib - memory.before_mib > 48


def test_waiting_for_the_loader_is_a_share(records):
    (record,) = records(import_module("benchmarks.loader_wait").loader_wait)
    assert record["sides"].keys() == {"loader alone", "training alone", "together"}
    assert 0 < record["sides"]["together"]["waiting_share"] < 1
    assert record["sides"]["loader alone"]["waiting_share"] > 0.9
    assert record["sides"]["training alone"]["waiting_share"] < 0.1


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
        forward_pass("ours", (2, 4), 8, 1, precision="float8")


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
    data = startup.make_scene(tmp_path)
    image = data / "imagesTr" / "case_0_0000.nii.gz"
    assert called_network(str(tmp_path / "stock.json"), monkeypatch, bundle_root=".", image=str(image))
    paths = {"dataset_dir": str(data), "context_dir": str(data), "output_dir": str(tmp_path / "answers")}
    paths |= {"checkpoint": str(tmp_path / "model.pt"), "device": "cpu"}
    assert called_network("configs/inference.json", monkeypatch, **paths)


def test_a_start_that_never_gets_there_says_why(tmp_path):
    startup.make_scene(tmp_path)
    with pytest.raises(ValueError, match="before its first step: "):
        startup.until_first_call(f"--config_file {tmp_path}/nothing.json --bundle_root .")


def test_change_of_dice_is_read_from_the_scores(tmp_path, records, monkeypatch):
    (tmp_path / "demo" / "data" / "Dataset900").mkdir(parents=True)
    (tmp_path / "demo" / "scores").mkdir()
    (tmp_path / "demo" / "scores" / "summary.json").touch()
    commands = []

    def run(config, options):
        commands.append((config, options))
        if config == "evaluate":
            folder = options.split("--output_dir ")[1]
            values = (0.8, 0.9) if "float32" in folder and "bfloat16" not in folder else (0.79, 0.93)
            bfloat16_dice.Path(folder).mkdir(parents=True)
            rows = "".join(f"case_{i},1,{value}\n" for i, value in enumerate(values))
            bfloat16_dice.Path(folder, "metrics.csv").write_text(f"case,label,dice\n{rows}")

    monkeypatch.setattr(bfloat16_dice, "run_bundle", run)
    (record,) = records(bfloat16_dice.bfloat16_dice, demo_dir=str(tmp_path / "demo"))
    assert record["change_of_mean_dice"] == pytest.approx(0.01)
    assert record["largest_change_of_a_case"] == pytest.approx(0.03)
    assert "--amp false" in commands[0][1] and "--amp true" in commands[2][1]
    assert "--checkpoint" not in commands[0][1], "the bundle's weights, as in the demo"
    with pytest.raises(FileNotFoundError, match="no finished demo in .*: run make demo"):
        bfloat16_dice.bfloat16_dice(demo_dir=str(tmp_path))
