"""The results against their targets, as a Markdown table.

python -m benchmarks.table [--results benchmarks/results.jsonl]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.paired import OUTPUT
from benchmarks.results import latest

Record = Mapping[str, Any]


class Goal(NamedTuple):
    """One line of the table.

    Attributes:
        work: what is measured.
        benchmark: module that measures it.
        case: how the record's case begins.
        target: what it should be.
        value: takes the figure from the record.
        form: how the figure is written.
        met: whether a figure is good enough.
        side: of the comparison that it is about; records without it do not count. None for all.
    """

    work: str
    benchmark: str
    case: str
    target: str
    value: Callable[[Record], float]
    form: str
    met: Callable[[float], bool]
    side: str | None = None


def _share(record: Record) -> float:
    return record["sides"]["ours"]["share_of_matrix_product"]


def _faster(work: str, benchmark: str, case: str, least: float, side: str = "ours") -> Goal:
    return Goal(
        work, benchmark, case, f"≥ {least:g}× faster", lambda record: record["ratios"][side]["speedup"], "{:.2f}×",
        lambda value: value >= least, side,
    )  # fmt: skip


def _within(work: str, benchmark: str, case: str, most: float, side: str, figure: str, form: str) -> Goal:
    return Goal(
        work, benchmark, case, f"≤ {form.format(most)}", lambda record: record["sides"][side][figure], form,
        lambda value: value <= most, side,
    )  # fmt: skip


def _smaller(work: str, benchmark: str, case: str, most: float, side: str = "ours") -> Goal:
    return Goal(
        work, benchmark, case, f"≤ {most:g}×", lambda record: record["ratios"][side]["memory"], "{:.2f}×",
        lambda value: value <= most, side,
    )  # fmt: skip


_FULL_STEP, _NARROW_STEP = "64^3 L=3, channels 32 to 512", "48^3 L=3, channels 16 to 128"
_SHIPPED, _SHIPPED_STEP = "40x56x40 L=3", "40x56x40 L=3, channels 16 to 128"
_BF16 = "ours, bfloat16"
GOALS = (
    _faster("forward 64³ L=3", "forward", "64^3 L=3", 2.2),
    _faster("forward 128³ L=1", "forward", "128^3 L=1", 2.2),
    Goal("forward 64³ L=3, share of the matrix-product rate", "forward", "64^3 L=3", "≥ 85 % (hoped for)", _share,
         "{:.0%}", lambda value: value >= 0.85),
    Goal("forward 128³ L=1, share of the matrix-product rate", "forward", "128^3 L=1", "≥ 85 % (hoped for)", _share,
         "{:.0%}", lambda value: value >= 0.85),
    _smaller("peak memory, forward 128³ L=1", "forward", "128^3 L=1", 0.5),
    Goal("peak memory, L=8 to L=64", "flat_memory", "", "grows ≤ 3 %", lambda record: record["peak_growth"], "{:+.1%}",
         lambda value: value <= 0.03),
    _smaller("bfloat16 forward, peak memory against our float32", "bfloat16_memory", "128^3", 0.6, "bfloat16"),
    _faster("forward 64³ L=3 in bfloat16, on a processor with AMX", "forward", "64^3 L=3", 5, _BF16),
    _faster("forward 128³ L=1, likewise", "forward", "128^3 L=1", 5, _BF16),
    _within("its peak memory", "forward", "128^3 L=1", 1600, _BF16, "peak_mib", "{:.0f} MiB"),
    _within("forward, shipped network, 40×56×40 L=3, likewise", "forward", _SHIPPED, 0.06, _BF16, "seconds",
            "{:.3f} s"),
    _within("training step, shipped network, 40×56×40 L=3, likewise", "training_step", _SHIPPED_STEP, 0.25, _BF16,
            "seconds", "{:.2f} s"),
    _faster("training step 64³ L=3, full width, likewise", "training_step", _FULL_STEP, 3.5, _BF16),
    Goal("bfloat16, change of mean Dice on the demo", "bfloat16_dice", "", "< 0.002",
         lambda record: record["change_of_mean_dice"], "{:.4f}", lambda value: value < 0.002),
    _faster("8 labels × 4 targets × 4 contexts, 64³", "many_labels", "8 labels x 4 targets x 4 contexts, 64^3", 2.8),
    _faster("training step 64³ L=3, full width", "training_step", _FULL_STEP, 1.8),
    _smaller("its peak memory", "training_step", _FULL_STEP, 0.6),
    _smaller("with activation checkpointing", "training_step", _FULL_STEP, 0.35, "ours, checkpointing"),
    _faster("training step 48³ L=3, 16–128 channels", "training_step", _NARROW_STEP, 1.8),
    _smaller("its peak memory", "training_step", _NARROW_STEP, 0.6),
    _smaller("with activation checkpointing", "training_step", _NARROW_STEP, 0.35, "ours, checkpointing"),
    _faster("second epoch's data path, groups per second", "data_path", "", 20),
    Goal("share of training time spent waiting for the loader", "loader_wait", "", "≤ 2 %",
         lambda record: record["sides"]["together"]["waiting_share"], "{:.1%}", lambda value: value <= 0.02),
    Goal("start until the first inference step, added to MONAI's", "startup", "", "≤ 0.5 s",
         lambda record: record["added_seconds"], "{:.2f} s", lambda value: value <= 0.5),
)  # fmt: skip


def table(results: str = OUTPUT) -> None:
    """Print the table.

    Args:
        results: JSON-lines file that the benchmarks appended to.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = latest(results)
    print("| work | target | measured | met | absolute |\n|---|---|---|---|---|")
    for goal in GOALS:
        records = [
            record
            for case, record in found.get(goal.benchmark, {}).items()
            if case.startswith(goal.case) and (goal.side is None or goal.side in record["sides"])
        ]
        if not records:
            print(f"| {goal.work} | {goal.target} | – | – | – |")
            continue
        value = goal.value(records[-1])
        met = "yes" if goal.met(value) else "no"
        print(f"| {goal.work} | {goal.target} | {goal.form.format(value)} | {met} | {_absolute(records[-1])} |")


def _absolute(record: Record) -> str:
    """Seconds and peak memory of every side."""
    texts = []
    for name, figures in record["sides"].items():
        seconds = f"{figures['seconds']:.3g} s" if "seconds" in figures else ""
        memory = f"{figures['peak_mib']:.0f} MiB" if "peak_mib" in figures and "gflops" not in figures else ""
        rate = f"{figures['gflops']:.0f} GFLOP/s" if "gflops" in figures else ""
        dice = f"Dice {figures['mean_dice']:.4f}" if "mean_dice" in figures else ""
        texts.append(f"{name}: {', '.join(filter(None, (seconds, memory, rate, dice)))}")
    return "; ".join(texts)


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(table)
