"""Figures of the benchmarks' page, from the results file.

    python -m benchmarks.plots [--results benchmarks/results.jsonl --output_dir docs/figures]

Needs Matplotlib (requirements-dev.txt).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.paired import BASELINE, OUTPUT
from benchmarks.results import latest
from scripts.runtime.atomic_files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend is chosen before

_DPI = 80
_COLOURS = {BASELINE: "tab:gray", "ours": "tab:blue", "ours, checkpointing": "tab:cyan"}
_COMPARED = ("forward", "many_labels", "training_step")


def plots(results: str = OUTPUT, output_dir: str = "docs/figures") -> None:
    """Draw `context_curve.png` and `against_baseline.png`; earlier ones are replaced.

    Args:
        results: JSON-lines file that the benchmarks appended to.
        output_dir: where the figures go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no results to draw.
    """
    found = latest(results)
    curve = sorted(found.get("context_curve", {}).values(), key=lambda record: record["context_size"])
    compared = {case: record for name in _COMPARED for case, record in found.get(name, {}).items()}
    if not curve and not compared:
        raise ValueError(f"{results} has no results of context_curve, {', '.join(_COMPARED)}: run make bench")
    if curve:
        _save(_context_curve(curve), Path(output_dir) / "context_curve.png")
    if compared:
        _save(_against_baseline(compared), Path(output_dir) / "against_baseline.png")


def _context_curve(records: list[Mapping[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [record["context_size"] for record in records]
    for axis, key, label, scale in ((axes[0], "seconds", "seconds", 1.0), (axes[1], "peak_mib", "peak GiB", 1 / 1024)):
        for side in (BASELINE, "ours"):
            values = [record["sides"][side][key] * scale for record in records]
            axis.plot(sizes, values, marker="o", color=_COLOURS[side], label=side)
        axis.set(xscale="log", xlabel="contexts L", ylabel=label, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(f"forward pass {records[0]['case'].split(' L=')[0]}, {records[0]['machine']['device']}")
    return figure


def _against_baseline(records: Mapping[str, Mapping[str, Any]]) -> plt.Figure:
    bars = [
        (f"{record['benchmark'].replace('_', ' ')}\n{case}", side, ratios)
        for case, record in records.items()
        for side, ratios in record["ratios"].items()
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.45 * len(bars)), sharey=True, layout="constrained")
    names = [name if side == "ours" else side for name, side, _ in bars]
    colours = [_COLOURS.get(side, "tab:blue") for _, side, _ in bars]
    for axis, key, label in ((axes[0], "speedup", "times faster"), (axes[1], "memory", "peak memory, times baseline")):
        drawn = axis.barh(range(len(bars)), [ratios[key] for *_, ratios in bars], color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=2)
        axis.axvline(1, color=_COLOURS[BASELINE], linestyle="--")
        axis.set(xlabel=label)
        axis.margins(x=0.15)
    axes[0].set_yticks(range(len(bars)), names, fontsize=7)
    axes[0].invert_yaxis()
    return figure


def _save(figure: plt.Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png"))
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(plots)
