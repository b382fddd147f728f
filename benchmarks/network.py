"""The network's speed and memory, against the plain network written from its description, in float32."""

from __future__ import annotations

import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.measure import BASELINE, NOISE, Row, Run, Side, clock, compare, peak_mib, rows, timed, work
from scripts.losses import SmoothL3L1Loss
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main

if TYPE_CHECKING:
    from monai.data import MetaTensor

FULL = (32, 64, 128, 256, 512)
"""Channels of the published network."""
NARROW = (16, 32, 64, 128)
"""Channels of a network that is worth training on a processor."""
SHIPPED_GRID = (40, 56, 40)
"""Voxels that the shipped weights, a narrow network, are meant for."""
BFLOAT16 = "ours, bfloat16"
KINDS = {BASELINE: {"kind": BASELINE}, "ours": {"kind": "ours"}, BFLOAT16: {"kind": "ours", "bfloat16": True}}
"""Sides of most comparisons."""
SPACING_MM = 1.0
_BF16_TOLERANCE = 0.1
_SAMPLING_SECONDS = 0.002


@dataclass(frozen=True)
class Case:
    """What a network is given.

    Attributes:
        channels: width of each stage.
        grid: voxels along each axis.
        context_size: pairs L.
        mini_context_size: of them run at once.
    """

    channels: Sequence[int]
    grid: Sequence[int]
    context_size: int
    mini_context_size: int = 3

    def __str__(self) -> str:
        """``64³, L=3, 32 to 512 channels``."""
        grid = f"{self.grid[0]}³" if len(set(self.grid)) == 1 else "×".join(map(str, self.grid))
        pairs = f"L={self.context_size}, " if self.context_size else ""
        return f"{grid}, {pairs}{self.channels[0]} to {self.channels[-1]} channels"

    def sides(self, function: str, kinds: Mapping[str, Mapping[str, Any]], run: Run, **more: Any) -> dict[str, Side]:
        """Kinds of network with the same case, to compare."""
        given = {"case": asdict(self), "device": run.device} | more
        return {name: Side(f"network:{function}", own | given) for name, own in kinds.items()}


TINY = Case((2, 4), (8, 8, 8), 2)
"""For ``--quick``."""
CASES = (Case(FULL, (64,) * 3, 3), Case(FULL, (128,) * 3, 1), Case(NARROW, SHIPPED_GRID, 3))
STEP_CASES = (CASES[0], Case(NARROW, (48,) * 3, 3), CASES[2])


@work
def forward(run: Run, pairs: int = 3) -> Iterator[Row]:
    """Forward pass in float32 and bfloat16, and its share of the machine's matrix-product rate.

    The share counts the baseline's operations, so that an operation saved counts as speed.

    Args:
        run: how it is run.
        pairs: how often all sides are measured.
    """
    for case in (TINY,) if run.quick else CASES:
        rate = Side("network:matrix_product", {"device": run.device, "size": 64 if run.quick else 2048})
        found = compare(case.sides("forward_pass", KINDS, run) | {"matrix product": rate}, run, pairs)
        gflops = found.pop("matrix product")["gflops"]
        for figures in found.values():
            figures["share_of_matrix_product"] = forward_flops(case) / 1e9 / figures["seconds"] / gflops
        yield from rows(str(case), found, NOISE)


@work
def step(run: Run, pairs: int = 3) -> Iterator[Row]:
    """Forward, backward and a step of Adam, in float32, in bfloat16, and with activation checkpointing.

    Args:
        run: how it is run.
        pairs: how often all sides are measured.
    """
    kinds = KINDS | {"ours, checkpointing": {"kind": "ours", "activation_checkpointing": True}}
    for case in (TINY,) if run.quick else STEP_CASES:
        yield from rows(str(case), compare(case.sides("training_step", kinds, run), run, pairs), NOISE)


@work
def memory(run: Run, context_sizes: Sequence[int] = (8, 64)) -> Iterator[Row]:
    """Peak memory with many contexts against few, read from a file piece by piece.

    Pages of a mapped file are the system's to take back, so the peak is that of the process's own memory, sampled all
    the time; on a GPU that of PyTorch's allocator.

    Args:
        run: how it is run.
        context_sizes: numbers of context pairs L; the others are compared with the first.
    """
    case = Case(FULL, (64,) * 3, 0, 2)
    if run.quick:
        case, context_sizes = replace(TINY, context_size=0, mini_context_size=2), (2, 4)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name in ("images", "masks"):
            with (Path(folder) / name).open("wb") as file:
                for _ in range(max(context_sizes)):
                    rng.random(case.grid, np.float32).tofile(file)
        kinds = {f"L={n}": {"context_size": n} for n in context_sizes}
        found = compare(case.sides("streamed_pass", kinds, run, folder=folder), run, pairs=1)
    first, *others = found.values()
    for figures in others:
        figures["growth"] = figures["peak_mib"] / first["peak_mib"] - 1
    yield from rows(f"{case}, mini-contexts of {case.mini_context_size}", found, NOISE)


@work
def labels(run: Run, labels: int = 8, targets: int = 4, context_size: int = 4, pairs: int = 1) -> Iterator[Row]:
    """Several labels of several targets through ICLInferer, against the baseline anew for each label and target.

    Both start from the same volumes in memory and end with the scores of every target.

    Args:
        run: how it is run.
        labels: number of labels.
        targets: number of targets.
        context_size: number of context pairs.
        pairs: how often all sides are measured.
    """
    case = Case(FULL, (64,) * 3, context_size)
    if run.quick:
        labels, targets, case = 2, 2, Case(TINY.channels, (16,) * 3, 2)
    sides = case.sides("all_labels", KINDS, run, labels=labels, targets=targets)
    name = f"{labels} labels × {targets} targets × {case.context_size} contexts, {replace(case, context_size=0)}"
    yield from rows(name, compare(sides, run, pairs), NOISE)


def forward_pass(kind: str, case: Mapping[str, Any], device: str, bfloat16: bool = False) -> dict[str, Any]:
    """Predict one random episode without gradients.

    Args:
        kind: as :func:`make_network`.
        case: fields of a :class:`Case`.
        device: where it runs.
        bfloat16: under autocast to it, as inference has it with ``--amp true``.
    """
    case = Case(**case)
    network, episode = make_network(kind, case, device).eval(), make_episode(case, device)
    with torch.no_grad(), _autocast(bfloat16, device):
        seconds, output = timed(lambda: network(*episode, case.mini_context_size), device)
    return {"seconds": seconds, "check": probe(output)} | _tolerance(bfloat16)


def training_step(
    kind: str, case: Mapping[str, Any], device: str, bfloat16: bool = False, **options: bool
) -> dict[str, Any]:
    """Forward pass, backward pass and a step of Adam on one random episode, after one that is not timed.

    Args are those of :func:`forward_pass`; ``options`` are of our network, such as ``activation_checkpointing``.
    """
    case = Case(**case)
    network, episode = make_network(kind, case, device, **options).train(), make_episode(case, device)
    loss_function, optimizer = SmoothL3L1Loss(), torch.optim.Adam(network.parameters(), 1e-5)
    wanted = (episode[0] > 0.5).float()

    def one() -> Tensor:
        optimizer.zero_grad()
        with _autocast(bfloat16, device):
            predicted = network(*episode, case.mini_context_size).float()
        loss = loss_function(predicted, wanted)
        loss.backward()
        optimizer.step()
        return loss

    seconds, loss = timed(one, device)
    # after one step: gradients have had their say
    return {"seconds": seconds, "check": [loss.item()]} | _tolerance(bfloat16)


def streamed_pass(case: Mapping[str, Any], context_size: int, folder: str, device: str) -> dict[str, Any]:
    """Predict once from the first contexts of the mapped files ``images`` and ``masks`` in a folder."""
    case = Case(**case | {"context_size": context_size})
    size = context_size * int(np.prod(case.grid))
    images, masks = (
        torch.from_file(f"{folder}/{name}", shared=True, size=size).view(1, context_size, 1, *case.grid)
        for name in ("images", "masks")
    )
    network = make_network("ours", case, device).eval()
    target = torch.rand(1, 1, *case.grid, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), PeakMemory(device) as memory:
        started = clock(device)
        network(target, images, masks, case.mini_context_size)
        seconds = clock(device) - started
    return {"seconds": seconds, "peak_mib": memory.peak_mib}


def all_labels(
    kind: str, case: Mapping[str, Any], device: str, labels: int, targets: int, bfloat16: bool = False
) -> dict[str, Any]:
    """Scores of all targets for all labels; noise, for the work does not depend on what is seen."""
    from monai.data import MetaTensor

    case, generator = Case(**case), torch.Generator().manual_seed(0)
    grid = (1, *case.grid)
    scans = [MetaTensor(torch.rand(grid, generator=generator)) for _ in range(targets)]
    images = [MetaTensor(torch.rand(grid, generator=generator)) for _ in range(case.context_size)]
    maps = [MetaTensor(torch.randint(labels + 1, grid, generator=generator).float()) for _ in images]
    network = make_network(kind, case, device).eval()
    predict = _label_by_label if kind == BASELINE else partial(_with_inferer, amp=bfloat16)
    seconds, scores = timed(
        lambda: predict(network, scans, images, maps, range(1, labels + 1), case.mini_context_size, device),
        device,
        warm_ups=0,
    )
    return {"seconds": seconds, "check": [v for score in scores for v in probe(score)]} | _tolerance(bfloat16)


@torch.no_grad()
def _label_by_label(
    network: nn.Module,
    scans: Sequence[MetaTensor],
    images: Sequence[MetaTensor],
    maps: Sequence[MetaTensor],
    values: Sequence[int],
    mini_context_size: int,
    device: str,
) -> list[Tensor]:
    from scripts.data.preprocessing import Preprocessing

    preprocessing = Preprocessing(images[0].shape[1:], SPACING_MM)
    pairs = [preprocessing.pair(image, label) for image, label in zip(images, maps, strict=True)]
    context_in, numbers = (torch.stack(side)[None] for side in zip(*pairs, strict=True))
    scores = []
    for scan in scans:
        target = preprocessing.image(scan)[None].to(device)
        predictions = [network(target, context_in, (numbers == v).float(), mini_context_size) for v in values]
        scores.append(torch.cat(predictions, dim=1))
    return scores


def _with_inferer(
    network: nn.Module,
    scans: Sequence[MetaTensor],
    images: Sequence[MetaTensor],
    maps: Sequence[MetaTensor],
    values: Sequence[int],
    mini_context_size: int,
    device: str,
    amp: bool,
) -> list[Tensor]:
    from scripts.inferer import ICLInferer

    options = {"mini_context_size": mini_context_size, "spacing": SPACING_MM, "amp": amp, "align": "off"}
    inferer = ICLInferer(network, device, labels=values, **options)
    inferer.set_context(images, maps)
    return [inferer(inferer.target(scan).image[None], inferer.network) for scan in scans]


def matrix_product(device: str = "cpu", size: int = 2048, repeats: int = 8) -> dict[str, Any]:
    """The device's float32 matrix-product rate in GFLOP/s: what a convolution can reach at best."""
    a = torch.rand(size, size, device=device)
    seconds, _ = timed(lambda: a @ a, device, warm_ups=2, repeats=repeats)
    return {"gflops": 2 * size**3 / seconds / 1e9}


def make_network(kind: str, case: Case, device: str = "cpu", **options: bool) -> nn.Module:
    """A network with weights that depend on the parameters' names alone, laid out as the workflows lay it out.

    Args:
        kind: ``baseline``, or anything else for ours.
        case: widths and grid.
        device: where it goes.
        options: of ours.
    """
    if kind == BASELINE:
        network = BaselineNetwork(channels=case.channels, spatial_size=case.grid).to(device)
    else:
        network = Neuroverse3D(channels=case.channels, spatial_size=case.grid, **options)
        network = network.to(device, memory_format=torch.channels_last_3d)
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bound = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1  # keeps variance: every part is heard
        with torch.no_grad():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return network


def make_episode(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random target ``(1, 1, H, W, D)`` on the device; context images and masks ``(1, L, 1, H, W, D)`` on the host."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 1, *case.grid, generator=generator)
    images = torch.rand(1, case.context_size, 1, *case.grid, generator=generator)
    masks = (torch.rand(images.shape, generator=generator) > 0.5).float()
    return target.to(device), images, masks


def probe(output: Tensor, count: int = 16) -> list[float]:
    """Values spread over an output, to see that two networks compute the same."""
    values = output.detach().float().flatten()
    return values[torch.linspace(0, values.numel() - 1, count).long()].tolist()


def forward_flops(case: Case) -> int:
    """Floating-point operations of the baseline's forward pass: two for each multiplication with its addition."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        pairs = torch.empty(1, case.context_size, 1, *case.grid)
        BaselineNetwork(channels=case.channels)(torch.empty(1, 1, *case.grid), pairs, pairs)
    return counter.get_total_flops()


class PeakMemory:
    """Watches the process's anonymous memory, or PyTorch's on a GPU, for its peak."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak_mib = 0.0
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._watcher.join()
        if self.device.startswith("cuda"):
            self.peak_mib = peak_mib(self.device)

    def _watch(self) -> None:
        while not self._left.wait(_SAMPLING_SECONDS):
            self.peak_mib = max(self.peak_mib, _anonymous_mib())


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _autocast(bfloat16: bool, device: str) -> torch.autocast:
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bfloat16)


def _tolerance(bfloat16: bool) -> dict[str, float]:
    """How far a check may be from float32, as :func:`benchmarks.measure.compare` reads it."""
    return {"tolerance": _BF16_TOLERANCE} if bfloat16 else {}


WORKS = {"forward": forward, "step": step, "memory": memory, "labels": labels}

if __name__ == "__main__":
    main(WORKS)
