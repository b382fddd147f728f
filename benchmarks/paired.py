"""How the benchmarks measure: baseline and ours in turn, each in a fresh process, ratios within pairs.

A measurement is a function of a benchmark's module that returns a dict of figures, ``seconds`` among them where time
counts. It runs in a process of its own, so that peaks of memory do not mix; the peak is that of the whole process,
libraries included, or on a GPU that of PyTorch's allocator. The sides of a comparison run alternately and in an order
that turns round from pair to pair, so that a machine that slows down or speeds up does so for both, and the ratio is
the median over the pairs.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.runtime.options import flag

BASELINE = "baseline"
OUTPUT = "benchmarks/results.jsonl"
_ANSWER = "measured: "
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_BUSY = 0.5


@dataclass(frozen=True)
class Conditions:
    """What a benchmark is run under, the same for all sides; every benchmark has these options.

    Attributes:
        device: cpu or cuda.
        threads: processor threads of each measurement.
        pairs: how often all sides are measured; 0 takes the benchmark's own number.
        preload: allocator library that every measurement is started with (LD_PRELOAD), such as tcmalloc.
        quick: tiny sizes, to see that it runs; the figures mean nothing.
        output: JSON-lines file that results are appended to.
    """

    device: str = "cpu"
    threads: int = 2
    pairs: int = 0
    preload: str = ""
    quick: bool = False
    output: str = OUTPUT


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        function: a function of a module in ``benchmarks``, ``"module:name"``.
        arguments: what it is called with; plain values, for they travel as JSON.
    """

    function: str
    arguments: Mapping[str, Any]


def benchmark(function: Callable[..., Iterator[dict[str, Any]]]) -> Callable[..., None]:
    """Make a command-line function of a generator of records.

    The generator takes :class:`Conditions` first; in their place the command line has their fields as options. Every
    record is printed and appended to the results file, together with the conditions and the machine.
    """
    own = list(inspect.signature(function).parameters.values())[1:]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Conditions)
    ]

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        given = {f.name: options.pop(f.name) for f in fields(Conditions) if f.name in options}
        conditions = Conditions(**given | {"quick": flag(given.get("quick", False))})
        if conditions.preload and not Path(conditions.preload).is_file():
            raise FileNotFoundError(f"no library {conditions.preload}: --preload takes the path of an allocator")
        for record in function(conditions, *args, **options):
            _keep(record, function.__name__, conditions)

    run.__signature__ = inspect.Signature(own + shared)
    run.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n{_shared_help(has_arguments=bool(own))}"
    return run


def compare(sides: Mapping[str, Side], conditions: Conditions, pairs: int = 3) -> dict[str, Any]:
    """Measure all sides in turn.

    Args:
        sides: by name. Where one is the baseline, the others get ratios against it.
        conditions: of the measurements; their ``pairs`` goes before the argument.
        pairs: how often.

    Returns:
        ``sides``: name -> medians of its figures, ``peak_mib`` among them; ``ratios``: name -> ``speedup`` and
        ``memory``, medians of the ratios within the pairs; ``pairs``.

    Raises:
        ValueError: a measurement failed, or two sides that state a ``check`` do not compute the same.
    """
    pairs = 1 if conditions.quick else conditions.pairs or pairs
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    schedule = [name for turn in range(pairs) for name in (sides if turn % 2 == 0 else reversed(sides))]
    progress = tqdm(schedule, unit="run", disable=None, leave=False)
    for name in progress:
        progress.set_description(name)
        measured[name].append(measure_apart(sides[name], conditions))
    _same_function(measured)
    return {
        "pairs": pairs,
        "sides": {name: _medians(runs) for name, runs in measured.items()},
        "ratios": {
            name: _ratios(measured[BASELINE], runs)
            for name, runs in measured.items()
            if BASELINE in measured and name != BASELINE
        },
    }


def measure_apart(side: Side, conditions: Conditions) -> dict[str, Any]:
    """Measure one side once, in a fresh process.

    Raises:
        ValueError: the process failed; its last words are in the message.
    """
    code = f"from benchmarks.paired import answer; answer({side.function!r}, {json.dumps(dict(side.arguments))!r})"
    threads = {name: str(conditions.threads) for name in _THREADS}
    preload = {"LD_PRELOAD": conditions.preload} if conditions.preload else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | threads | preload, capture_output=True, text=True, check=False
    )
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
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory, from before this program was loaded
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock(device: str = "cpu") -> float:
    """Seconds on a steady clock, once the device has done all that was asked of it."""
    if device.startswith("cuda"):
        import torch

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


def matrix_product(device: str = "cpu", size: int = 2048, repeats: int = 8) -> dict[str, Any]:
    """The device's float32 matrix-product rate in GFLOP/s: what a convolution can reach at best."""
    import torch

    a = torch.rand(size, size, device=device)
    seconds, _ = timed(lambda: a @ a, device, warm_ups=2, repeats=repeats)
    return {"gflops": 2 * size**3 / seconds / 1e9}


def machine(device: str) -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "abilities": [torch.backends.cpu.get_cpu_capability(), *_bfloat16_units()],
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "version": _version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _bfloat16_units() -> list[str]:
    from scripts.runtime.precision import bfloat16_units

    return [name for name, there in bfloat16_units().items() if there]


def _keep(record: dict[str, Any], name: str, conditions: Conditions) -> None:
    where = machine(conditions.device)
    whole = {"benchmark": name} | record | {"conditions": asdict(conditions), "machine": where}
    print(
        f"\n{name} {record.get('case', '')}: {where['device']} ({', '.join(where['abilities'])}), "
        f"{conditions.threads} threads, {_allocator(conditions)}"
    )
    for side, figures in record["sides"].items():
        print(f"  {side:24s}" + "  ".join(f"{key} {_short(value)}" for key, value in figures.items()))
    for side, ratios in record.get("ratios", {}).items():
        shown = {"speedup": "{:.2f}x faster", "memory": "{:.2f}x the peak memory"}
        print(f"  {side:24s}" + ", ".join(shown[key].format(value) for key, value in ratios.items()))
    for key in record.keys() - {"case", "sides", "ratios", "pairs"}:
        print(f"  {key}: {_short(record[key])}")
    sys.stdout.flush()
    if conditions.output:
        path = Path(conditions.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")


def _same_function(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Compare the ``check`` values of all measurements, which are dropped from the figures then."""
    first: tuple[str, list[float]] | None = None
    for name, runs in measured.items():
        for run in runs:
            values = run.pop("check", None)
            if values is None:
                continue
            first = first or (name, values)
            scale = max(map(abs, first[1])) + 1e-12
            gap = max(abs(a - b) for a, b in zip(values, first[1], strict=True)) / scale
            if not gap < run.get("tolerance", 1e-3):
                raise ValueError(f"{name} and {first[0]} do not compute the same: outputs differ by {gap:.1e}")


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: _median(run[key] for run in runs) for key in runs[0] if key != "tolerance"}


def _median(values: Iterator[Any]) -> Any:
    values = list(values)
    return statistics.median(values) if isinstance(values[0], (int, float)) else values[0]


def _ratios(baseline: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    pairs = list(zip(baseline, runs, strict=True))
    ratios = {"memory": statistics.median(ours["peak_mib"] / base["peak_mib"] for base, ours in pairs)}
    if "seconds" in runs[0] and "seconds" in baseline[0]:
        ratios = {"speedup": statistics.median(base["seconds"] / ours["seconds"] for base, ours in pairs)} | ratios
    return ratios


def _allocator(conditions: Conditions) -> str:
    preloaded = conditions.preload or os.environ.get("LD_PRELOAD", "")
    return f"allocator {Path(preloaded).name}" if preloaded else "the system's allocator"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shared_help(has_arguments: bool) -> str:
    lines = inspect.cleandoc(Conditions.__doc__).split("Attributes:\n")[1]
    return ("" if has_arguments else "\nArgs:\n") + lines


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version() -> str:
    """Commit of the code, where it is a git checkout."""
    folder = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
