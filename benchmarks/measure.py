"""How every benchmark is run, measured and recorded.

A benchmark is a generator of :class:`Row`; :func:`work` makes a command of it, prints its rows and, with ``--record
true``, appends them to ``benchmarks/record.jsonl``, from which ``python -m benchmarks.page`` makes the tables of
``docs/benchmarks.md``.

Speed and memory are measured by :func:`compare`: every measurement in a process of its own, so that peaks of memory do
not mix, and the sides in turn, in an order that turns round from pair to pair, so that a machine that slows down does
so for both. A ratio is the median of the ratios within the pairs.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from tqdm import tqdm

from scripts.runtime.manifest import environment
from scripts.runtime.options import flag
from scripts.runtime.precision import bfloat16_units

RECORD = Path(__file__).with_name("record.jsonl")
BASELINE = "baseline"
NOISE = "random volumes"
_ANSWER = "measured: "
_DIGITS = 5

Value = float | Sequence[float]
"""A number, or a mean with the bounds of its 95 % interval."""

FIGURES = {
    "dice": ("Dice", "{:.3f}"),
    "averaging": ("averaging the contexts' labels", "{:.3f}"),
    "gain": ("gain", "{:+.3f}"),
    "seconds": ("seconds", "{:.3g}"),
    "cpu_seconds": ("processor seconds", "{:.3g}"),
    "first_mask_seconds": ("first mask after, seconds", "{:.3g}"),
    "command_seconds": ("with the start", "{:.3g}"),
    "speedup": ("times faster", "{:.2f}×"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "memory": ("of the baseline's peak", "{:.2f}×"),
    "growth": ("growth of the peak", "{:+.1%}"),
    "share_of_matrix_product": ("of the matrix-product rate", "{:.0%}"),
    "waiting_share": ("waiting for the loader", "{:.1%}"),
    "dice_of_case": ("largest change of a case", "{:.5f}"),
    "change_of_dice": ("change of mean Dice", "{:.5f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "psnr_gain": ("gain, dB", "{:+.2f}"),
    "marked": ("share marked", "{:.3f}"),
    "correlation": ("Pearson, per label", "{:.2f}"),
    "rank_correlation": ("Spearman, per label", "{:.2f}"),
    "correlation_of_cases": ("Pearson, per case", "{:.2f}"),
    "mean_absolute_error": ("mean absolute error", "{:.3f}"),
    "cases": ("cases", "{:.0f}"),
    "flagged": ("flagged", "{:.0f}"),
    "worst": ("named as the worst", "{:.0f}"),
    "out_of_line": ("far below the others", "{:.0f}"),
    "cold_seconds": ("first proposal after saving, seconds", "{:.2f}"),
    "warm_seconds": ("further scans, seconds", "{:.2f}"),
}
"""What a benchmark may state: its heading and how it is written."""


class Row(NamedTuple):
    """One line of the record.

    Attributes:
        case: what is measured.
        figures: by the names of :data:`FIGURES`.
        data: what it is measured on.
        side: of a comparison.
    """

    case: str
    figures: Mapping[str, Value]
    data: str
    side: str = ""


@dataclass(frozen=True)
class Run:
    """How a benchmark is run; every one has these options.

    Attributes:
        device: cpu or cuda.
        threads: processor threads.
        quick: the smallest work, to see that it runs; the figures mean nothing.
        record: append the figures to benchmarks/record.jsonl.
        note: for the record: what else a reader should know, such as what ran beside it.
    """

    device: str = "cpu"
    threads: int = 2
    quick: bool = False
    record: bool = False
    note: str = ""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        function: a function of a module in ``benchmarks``, ``"module:name"``.
        arguments: what it is called with; plain values, for they travel as JSON.
    """

    function: str
    arguments: Mapping[str, Any]


def work(function: Callable[..., Iterator[Row]]) -> Callable[..., None]:
    """Make a command of a generator of rows.

    Parameters whose type is a dataclass, :class:`Run` the first of them, have their fields as options on the command
    line; those with a method ``smallest`` are replaced by what it returns in a quick run.
    """
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    parts = {p.name: hints[p.name] for p in parameters if is_dataclass(hints[p.name])}
    parts = dict(sorted(parts.items(), key=lambda part: part[1] is Run))  # what every benchmark has comes last
    own = [p for p in parameters if p.name not in parts]
    shared = {
        f.name: inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=f.type,
        )
        for part in parts.values()
        for f in fields(part)
    }
    signature = inspect.Signature([*own, *shared.values()])
    switches = {name for name, p in signature.parameters.items() if p.annotation in (bool, "bool")}

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        given = signature.bind(*args, **options).arguments
        given |= {name: flag(given[name]) for name in switches & given.keys()}
        rest = {name: value for name, value in given.items() if name not in shared}
        made = {
            name: part(**{f.name: given[f.name] for f in fields(part) if f.name in given})
            for name, part in parts.items()
        }
        (run,) = (part for part in made.values() if isinstance(part, Run))
        if run.quick:
            if run.record:
                raise ValueError("figures of --quick mean nothing: leave it or --record out")
            made = {name: part.smallest() if hasattr(part, "smallest") else part for name, part in made.items()}
        torch.set_num_threads(run.threads)
        where = machine(run) | {"load": round(os.getloadavg()[0], 2)}
        typed = {name: value for name, value in given.items() if value != signature.parameters[name].default}
        said = where | {"command": _command(function, typed), "note": run.note}
        for row in function(**made, **rest):
            print(f"{row.case:44s} {row.side:24s} {shown(row.figures)}", flush=True)
            if run.record:
                _append({"benchmark": benchmark_name(function)} | row._asdict() | said)

    command.__signature__ = signature
    command.__doc__ = _help(function, parts)
    return command


def benchmark_name(function: Callable) -> str:
    """As the record has it: subject and work, ``network forward``."""
    return f"{Path(inspect.getfile(inspect.unwrap(function))).stem} {function.__name__}"


def shown(figures: Mapping[str, Value]) -> str:
    """Figures in a line."""
    return "  ".join(f"{FIGURES[name][0]} {written(name, value)}" for name, value in figures.items())


def written(name: str, value: Value) -> str:
    """A figure as text, with its interval if it has one."""
    form = FIGURES[name][1]
    if isinstance(value, Sequence):
        mean, low, high = (form.format(number) for number in value)
        return f"{mean} [{low}, {high}]"
    return form.format(value)


def compare(sides: Mapping[str, Side], run: Run, pairs: int = 3) -> dict[str, dict[str, float]]:
    """Measure all sides in turn.

    Args:
        sides: by name.
        run: device and threads; a quick one measures once.
        pairs: how often.

    Returns:
        Name -> medians of its figures, ``peak_mib`` among them. Where one side is the baseline, the others also have
        ``speedup`` and ``memory``, medians of the ratios within the pairs.

    Raises:
        ValueError: a measurement failed, or two sides that state a ``check`` do not compute the same.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    turns = range(1 if run.quick else pairs)
    progress = tqdm([n for turn in turns for n in (sides if turn % 2 == 0 else reversed(sides))], disable=None)
    for name in progress:
        progress.set_description(name)
        measured[name].append(measure_apart(sides[name], run.threads))
    _same_function(measured)
    found = {name: _medians(runs) for name, runs in measured.items()}
    for name in measured.keys() - {BASELINE} if BASELINE in measured else ():
        found[name] |= _ratios(measured[BASELINE], measured[name])
    return found


def rows(case: str, sides: Mapping[str, Mapping[str, float]], data: str) -> Iterator[Row]:
    """A row for every side of a comparison."""
    for side, figures in sides.items():
        yield Row(case, figures, data, side)


def measure_apart(side: Side, threads: int) -> dict[str, Any]:
    """Measure one side once, in a fresh process.

    Raises:
        ValueError: the process failed; its last words are in the message.
    """
    code = f"from benchmarks.measure import answer; answer({side.function!r}, {json.dumps(dict(side.arguments))!r})"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not answers:
        words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ValueError(f"{side.function} failed with exit status {done.returncode}: {words}")
    return json.loads(answers[-1].removeprefix(_ANSWER))


def answer(function: str, arguments: str) -> None:
    """Run a measurement in this process and print its figures for the process that started it.

    Args:
        function: as in :class:`Side`.
        arguments: JSON.
    """
    print(_ANSWER + json.dumps(call(function, json.loads(arguments))), flush=True)


def call(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a measurement made in this process; ``peak_mib`` is added where it does not state one."""
    module, name = function.split(":")
    figures = getattr(import_module(f"benchmarks.{module}"), name)(**arguments)
    return {"peak_mib": peak_mib(arguments.get("device", "cpu"))} | figures


def peak_mib(device: str = "cpu") -> float:
    """Highest resident memory of this process so far, or on a GPU of what PyTorch allocated, in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory, from before this program was loaded
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock(device: str = "cpu") -> float:
    """Seconds on a steady clock, once the device has done all that was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[[], Any], device: str = "cpu", warm_ups: int = 1, repeats: int = 1) -> tuple[float, Any]:
    """Median seconds of a call, and what the last one returned.

    Args:
        function: what to time.
        device: whose work to wait for.
        warm_ups: calls before, not timed: libraries set themselves up in the first one.
        repeats: timed calls.
    """
    for _ in range(warm_ups):
        function()
    seconds = []
    for _ in range(repeats):
        started = clock(device)
        result = function()
        seconds.append(clock(device) - started)
    return statistics.median(seconds), result


def machine(run: Run) -> dict[str, Any]:
    """What a figure is measured on, with which code, and when."""
    found = environment(run.device)
    units = [unit for unit, there in bfloat16_units().items() if there]
    return {
        "device": found.get("gpu", found["processor"]),
        "abilities": [found["cpu_capability"], *units],
        "cores": len(os.sched_getaffinity(0)),
        "threads": run.threads,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _append(line: dict[str, Any]) -> None:
    line["figures"] = {name: _rounded(value) for name, value in line["figures"].items()}
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _rounded(value: Value) -> Value:
    return [_rounded(v) for v in value] if isinstance(value, Sequence) else float(f"{value:.{_DIGITS}g}")


def _command(function: Callable, given: Mapping[str, Any]) -> str:
    """What was typed, with the names of files in place of paths on this machine."""
    words = ["python -m benchmarks." + benchmark_name(function)]
    for name, value in given.items():
        if name not in ("record", "note"):
            text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
            words.append(f"--{name} {shlex.quote(text)}")
    return " ".join(words)


def _same_function(measured: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Compare the ``check`` values of all measurements, which are dropped from the figures then."""
    first: tuple[str, list[float]] | None = None
    for name, runs in measured.items():
        for run in runs:
            values, allowed = run.pop("check", None), run.pop("tolerance", 1e-3)
            if values is None:
                continue
            first = first or (name, values)
            scale = max(map(abs, first[1])) + 1e-12
            gap = max(abs(a - b) for a, b in zip(values, first[1], strict=True)) / scale
            if not gap < allowed:
                raise ValueError(f"{name} and {first[0]} do not compute the same: outputs differ by {gap:.1e}")


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def _ratios(baseline: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    pairs = list(zip(baseline, runs, strict=True))
    ratios = {"memory": statistics.median(ours["peak_mib"] / base["peak_mib"] for base, ours in pairs)}
    if "seconds" in runs[0] and "seconds" in baseline[0]:
        ratios = {"speedup": statistics.median(base["seconds"] / ours["seconds"] for base, ours in pairs)} | ratios
    return ratios


def _help(function: Callable, parts: Mapping[str, type]) -> str:
    """The function's docstring, with the fields in place of the parameters that are dataclasses."""
    text, _, arguments = inspect.cleandoc(function.__doc__).partition("\n\nArgs:\n")
    own = [line for line in arguments.splitlines() if line.strip().split(":")[0] not in parts]
    shared = [inspect.cleandoc(part.__doc__).split("Attributes:\n")[1].split("\n\n")[0] for part in parts.values()]
    return "\n".join([text, "", "Args:", *shared, *own])


def _commit() -> str:
    """Of the code, where it is a git checkout; marked where the code differs from it."""
    git = ["git", "-C", str(RECORD.parent.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py", "configs", "models"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
