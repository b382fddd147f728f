"""The network's speed and memory, against the plain network written from its description, in float32."""

from __future__ import annotations

import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.measure import BASELINE, Row, Run, Side, clock, compare, peak_mib, rows, timed, work
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main

FULL = (32, 64, 128, 256, 512)
"""Channels of the published network."""
NARROW = (16, 32, 64, 128)
"""Channels of a network that is worth training on a processor."""
SHIPPED_GRID = (40, 56, 40)
"""Voxels that the shipped weights, a narrow network, are meant for."""
TINY = (2, 4)
"""Channels for ``--quick``."""
PRECISIONS = ("float32", "tf32", "bfloat16")
BFLOAT16 = "ours, bfloat16"
KINDS = {
    BASELINE: {"kind": BASELINE},
    "ours": {"kind": "ours"},
    BFLOAT16: {"kind": "ours", "precision": "bfloat16"},
}
"""Sides of most comparisons."""
SPACING_MM = 1.0
_BF16_TOLERANCE = 0.1
_SAMPLING_SECONDS = 0.002

Grid = int | Sequence[int]
"""Voxels of a grid: one number for all axes, or three."""


@work
def forward(
    run: Run,
    grids: Sequence[Grid] = (64, 128, SHIPPED_GRID),
    context_sizes: Sequence[int] = (3, 1, 3),
    widths: Sequence[Sequence[int]] = (FULL, FULL, NARROW),
    mini_context_size: int = 3,
    pairs: int = 3,
) -> Iterator[Row]:
    """Forward pass in float32 and bfloat16, and its share of the machine's matrix-product rate.

    The share counts the baseline's operations, so that an operation saved counts as speed.

    Args:
        run: how it is run.
        grids: voxels, one number or three for each case.
        context_sizes: number of context pairs, one for each case.
        widths: network widths, one list for each case.
        mini_context_size: context pairs that run at once.
        pairs: how often all sides are measured.
    """
    if run.quick:
        grids, context_sizes, widths = (8,), (2,), (TINY,)
    for grid, size, channels in zip(grids, context_sizes, widths, strict=True):
        given = _given(channels, grid, size, mini_context_size, run.device)
        sides = {name: Side("network:forward_pass", own | given) for name, own in KINDS.items()}
        rate = Side("network:matrix_product", {"device": run.device, "size": 64 if run.quick else 2048})
        found = compare(sides | {"matrix product": rate}, run, pairs)
        rate = {"gflops": found.pop("matrix product")["gflops"]}
        operations = forward_flops(channels, grid, size) / 1e9
        for figures in found.values():
            figures["share_of_matrix_product"] = operations / figures["seconds"] / rate["gflops"]
        found[BFLOAT16]["of_float32"] = found[BFLOAT16]["peak_mib"] / found["ours"]["peak_mib"]
        yield from rows(named(grid, size, channels), found | {"matrix product": rate})


@work
def contexts(
    run: Run,
    context_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    spatial_size: int = 64,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
    pairs: int = 1,
) -> Iterator[Row]:
    """Forward pass against the number of contexts L, which lie in host memory and are counted.

    Args:
        run: how it is run.
        context_sizes: numbers of context pairs L.
        spatial_size: voxels per axis.
        mini_context_size: context pairs that run at once.
        channels: network widths.
        pairs: how often both sides are measured.
    """
    if run.quick:
        context_sizes, spatial_size, channels = (1, 2), 8, TINY
    for size in context_sizes:
        # a long pass is its own warm-up
        given = _given(channels, spatial_size, size, mini_context_size, run.device) | {"warm_ups": int(size < 8)}
        sides = {kind: Side("network:forward_pass", {"kind": kind} | given) for kind in (BASELINE, "ours")}
        yield from rows(f"L={size}, {named(spatial_size, None, channels)}", compare(sides, run, pairs))


@work
def memory(
    run: Run,
    context_sizes: Sequence[int] = (8, 64),
    spatial_size: int = 64,
    mini_context_size: int = 2,
    channels: Sequence[int] = FULL,
) -> Iterator[Row]:
    """Peak memory with many contexts against few, read from a file piece by piece.

    Pages of a mapped file are the system's to take back, so the peak is that of the process's own memory, sampled all
    the time; on a GPU that of PyTorch's allocator.

    Args:
        run: how it is run.
        context_sizes: numbers of context pairs L; the others are compared with the first.
        spatial_size: voxels per axis.
        mini_context_size: context pairs that run at once.
        channels: network widths.
    """
    if run.quick:
        context_sizes, spatial_size, channels = (2, 4), 8, TINY
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name in ("images", "masks"):
            with (Path(folder) / name).open("wb") as file:
                for _ in range(max(context_sizes)):
                    rng.random((spatial_size,) * 3, np.float32).tofile(file)
        given = _given(channels, spatial_size, 0, mini_context_size, run.device) | {"folder": folder}
        sides = {f"L={n}": Side("network:streamed_pass", given | {"context_size": n}) for n in context_sizes}
        found = compare(sides, run, pairs=1)
    first, *others = found.values()
    for figures in others:
        figures["growth"] = figures["peak_mib"] / first["peak_mib"] - 1
    yield from rows(f"{named(spatial_size, None, channels)}, mini-contexts of {mini_context_size}", found)


@work
def labels(
    run: Run,
    labels: int = 8,
    targets: int = 4,
    context_size: int = 4,
    spatial_size: int = 64,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
    pairs: int = 1,
) -> Iterator[Row]:
    """Several labels of several targets through ICLInferer, against the baseline anew for each label and target.

    Both start from the same volumes in memory and end with the scores of every target.

    Args:
        run: how it is run.
        labels: number of labels.
        targets: number of targets.
        context_size: number of context pairs.
        spatial_size: voxels per axis.
        mini_context_size: context pairs that run at once.
        channels: network widths.
        pairs: how often all sides are measured.
    """
    if run.quick:
        labels, targets, context_size, spatial_size, channels = 2, 2, 2, 16, TINY
    given = _given(channels, spatial_size, context_size, mini_context_size, run.device)
    given |= {"labels": labels, "targets": targets}
    sides = {name: Side("network:all_labels", own | given) for name, own in KINDS.items()}
    case = f"{labels} labels × {targets} targets × {context_size} contexts, {named(spatial_size, None, channels)}"
    yield from rows(case, compare(sides, run, pairs))


@work
def volume(
    run: Run,
    context_sizes: Sequence[int] = (1, 8, 64),
    precisions: Sequence[str] = PRECISIONS,
    spatial_size: int = 128,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
    tflops: Sequence[float] = (67.0, 495.0, 990.0),
    gigabytes_per_second: float = 3350.0,
    pairs: int = 3,
) -> Iterator[Row]:
    """Seconds per volume of 128³ on a GPU, against the floor that its peak rates allow.

    The floor is the greater of two times: the baseline's operations at the peak rate of the precision, and the bytes
    that every convolution must at least read and write at the peak rate of memory. The default rates are those that
    NVIDIA states for an H100 SXM, dense.

    Args:
        run: how it is run.
        context_sizes: numbers of context pairs L.
        precisions: of float32, tf32 and bfloat16; on a processor there is no tf32.
        spatial_size: voxels per axis.
        mini_context_size: context pairs that run at once.
        channels: network widths.
        tflops: the device's peak rate in float32, tf32 and bfloat16.
        gigabytes_per_second: peak rate of the device's memory.
        pairs: how often both sides are measured.
    """
    if run.quick:
        context_sizes, precisions, spatial_size, channels = (1,), ("float32",), 8, TINY
    for size in context_sizes:
        operations = forward_flops(channels, spatial_size, size)
        values = convolution_values(channels, spatial_size, size)
        for precision in precisions:
            given = _given(channels, spatial_size, size, mini_context_size, run.device) | {"precision": precision}
            sides = {kind: Side("network:forward_pass", {"kind": kind} | given) for kind in (BASELINE, "ours")}
            found = compare(sides, run, pairs)
            rate = dict(zip(PRECISIONS, tflops, strict=True))[precision] * 1e12
            moved = values * (2 if precision == "bfloat16" else 4)
            floor = max(operations / rate, moved / gigabytes_per_second / 1e9)
            found["ours"] |= {"floor_seconds": floor, "times_the_floor": found["ours"]["seconds"] / floor}
            yield from rows(f"{named(spatial_size, size, channels)}, {precision}", found)


def forward_pass(
    kind: str,
    channels: Sequence[int],
    spatial_size: Grid,
    context_size: int,
    mini_context_size: int,
    device: str,
    precision: str = "float32",
    warm_ups: int = 1,
) -> dict[str, Any]:
    """Predict one random episode without gradients.

    Args:
        kind: as :func:`make_network`.
        channels: width of each stage.
        spatial_size: voxels, along each axis if it is one number.
        context_size: number of context pairs.
        mini_context_size: context pairs that run at once.
        device: where it runs.
        precision: as :func:`in_precision`.
        warm_ups: passes before the timed one.
    """
    autocast = in_precision(precision, device)
    network = make_network(kind, channels, spatial_size, device).eval()
    episode = make_episode(spatial_size, context_size, device)
    with torch.no_grad(), autocast:
        seconds, output = timed(lambda: network(*episode, mini_context_size), device, warm_ups)
    return {"seconds": seconds, "check": probe(output)} | tolerance(precision)


def streamed_pass(
    folder: str, channels: Sequence[int], spatial_size: int, context_size: int, mini_context_size: int, device: str
) -> dict[str, Any]:
    """Predict once from the first contexts of the mapped files ``images`` and ``masks``."""
    grid = (spatial_size,) * 3
    images, masks = (
        torch.from_file(f"{folder}/{name}", shared=True, size=context_size * spatial_size**3).view(
            1, context_size, 1, *grid
        )
        for name in ("images", "masks")
    )
    network = make_network("ours", channels, spatial_size, device).eval()
    target = torch.rand(1, 1, *grid, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), PeakMemory(device) as memory:
        started = clock(device)
        network(target, images, masks, mini_context_size)
        seconds = clock(device) - started
    return {"seconds": seconds, "peak_mib": memory.peak_mib}


def all_labels(
    kind: str,
    channels: Sequence[int],
    spatial_size: int,
    context_size: int,
    mini_context_size: int,
    device: str,
    labels: int,
    targets: int,
    precision: str = "float32",
) -> dict[str, Any]:
    """Scores of all targets for all labels; noise, for the work does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    grid = (1, *(spatial_size,) * 3)
    scans = [torch.rand(grid, generator=generator) for _ in range(targets)]
    images = [torch.rand(grid, generator=generator) for _ in range(context_size)]
    maps = [torch.randint(labels + 1, grid, generator=generator).float() for _ in range(context_size)]
    network = make_network(kind, channels, spatial_size, device).eval()
    predict = _label_by_label if kind == BASELINE else partial(_with_inferer, precision == "bfloat16")
    seconds, scores = timed(
        lambda: predict(network, scans, images, maps, labels, mini_context_size, device), device, warm_ups=0
    )
    return {"seconds": seconds, "check": [v for score in scores for v in probe(score)]} | tolerance(precision)


@torch.no_grad()
def _label_by_label(
    network: nn.Module,
    scans: Sequence[Tensor],
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    labels: int,
    mini_context_size: int,
    device: str,
) -> list[Tensor]:
    from monai.data import MetaTensor

    from scripts.data.preprocessing import Preprocessing

    preprocessing = Preprocessing(images[0].shape[1:], SPACING_MM)
    pairs = [preprocessing.pair(MetaTensor(image), MetaTensor(one)) for image, one in zip(images, maps, strict=True)]
    context_in, numbers = (torch.stack(side)[None] for side in zip(*pairs, strict=True))
    scores = []
    for scan in scans:
        target = preprocessing.image(MetaTensor(scan))[None].to(device)
        predictions = [
            network(target, context_in, (numbers == value).float(), mini_context_size) for value in range(1, labels + 1)
        ]
        scores.append(torch.cat(predictions, dim=1))
    return scores


def _with_inferer(
    amp: bool,
    network: nn.Module,
    scans: Sequence[Tensor],
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    labels: int,
    mini_context_size: int,
    device: str,
) -> list[Tensor]:
    from monai.data import MetaTensor

    from scripts.inferer import ICLInferer

    options = {"mini_context_size": mini_context_size, "spacing": SPACING_MM, "amp": amp, "align": "off"}
    inferer = ICLInferer(network, device, **options)
    inferer.set_context([MetaTensor(image) for image in images], [MetaTensor(one) for one in maps])
    return [inferer(inferer.target(MetaTensor(scan)).image[None], inferer.network) for scan in scans]


def matrix_product(device: str = "cpu", size: int = 2048, repeats: int = 8) -> dict[str, Any]:
    """The device's float32 matrix-product rate in GFLOP/s: what a convolution can reach at best."""
    a = torch.rand(size, size, device=device)
    seconds, _ = timed(lambda: a @ a, device, warm_ups=2, repeats=repeats)
    return {"gflops": 2 * size**3 / seconds / 1e9}


def make_network(
    kind: str, channels: Sequence[int], spatial_size: Grid, device: str = "cpu", **options: bool
) -> nn.Module:
    """A network with weights that depend on the parameters' names alone, laid out as the workflows lay it out.

    Args:
        kind: ``baseline``, or anything else for ours.
        channels: width of each stage.
        spatial_size: voxels of the grid, along each axis if it is one number.
        device: where it goes.
        options: of ours.
    """
    if kind == BASELINE:
        network = BaselineNetwork(channels=channels, spatial_size=spatial_size).to(device)
    else:
        network = Neuroverse3D(channels=channels, spatial_size=spatial_size, **options)
        network = network.to(device, memory_format=torch.channels_last_3d)
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bound = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1  # keeps variance: every part is heard
        with torch.no_grad():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return network


def make_episode(spatial_size: Grid, context_size: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random target ``(1, 1, H, W, D)`` on the device; context images and masks ``(1, L, 1, H, W, D)`` on the host."""
    generator = torch.Generator().manual_seed(0)
    grid = voxels(spatial_size)
    target = torch.rand(1, 1, *grid, generator=generator)
    images = torch.rand(1, context_size, 1, *grid, generator=generator)
    masks = (torch.rand(1, context_size, 1, *grid, generator=generator) > 0.5).float()
    return target.to(device), images, masks


def probe(output: Tensor, count: int = 16) -> list[float]:
    """Values spread over an output, to see that two networks compute the same."""
    values = output.detach().float().flatten()
    return values[torch.linspace(0, values.numel() - 1, count).long()].tolist()


def in_precision(precision: str, device: str) -> torch.autocast:
    """Set matrix products up for a precision, and give the context to compute in.

    Args:
        precision: ``float32``; ``tf32``: float32 with matrix products in TensorFloat-32 (CUDA only); ``bfloat16``
            autocast, as inference has it with ``--amp true``.
        device: where.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bfloat16")


def tolerance(precision: str) -> dict[str, float]:
    """How far a check in this precision may be from float32, as :func:`benchmarks.measure.compare` reads it."""
    return {} if precision == "float32" else {"tolerance": _BF16_TOLERANCE}


def voxels(spatial_size: Grid) -> tuple[int, ...]:
    """A grid's voxels along its three axes."""
    return (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)


def named(spatial_size: Grid, context_size: int | None, channels: Sequence[int]) -> str:
    """A case of the record: ``64³, L=3, 32 to 512 channels``."""
    grid = f"{spatial_size}³" if isinstance(spatial_size, int) else "×".join(map(str, spatial_size))
    pairs = "" if context_size is None else f"L={context_size}, "
    return f"{grid}, {pairs}{channels[0]} to {channels[-1]} channels"


def forward_flops(channels: Sequence[int], spatial_size: Grid, context_size: int) -> int:
    """Floating-point operations of the baseline's forward pass: two for each multiplication with its addition."""
    with FlopCounterMode(display=False) as counter:
        _baseline_pass(channels, spatial_size, context_size)
    return counter.get_total_flops()


def convolution_values(channels: Sequence[int], spatial_size: int, context_size: int) -> int:
    """Numbers that the baseline's convolutions read (input, weight, bias) and write, each once."""
    with _ConvolutionValues() as counter:
        _baseline_pass(channels, spatial_size, context_size)
    return counter.values


def _baseline_pass(channels: Sequence[int], spatial_size: Grid, context_size: int) -> None:
    """Without numbers, to count what is done."""
    with torch.device("meta"), torch.no_grad():
        pairs = torch.empty(1, context_size, 1, *voxels(spatial_size))
        network = BaselineNetwork(channels=channels, spatial_size=spatial_size)
        network(torch.empty(1, 1, *voxels(spatial_size)), pairs, pairs)


class _ConvolutionValues(TorchDispatchMode):
    """Adds up the sizes of what convolutions take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten.convolution.default:
            self.values += result.numel() + sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        return result


class PeakMemory:
    """Watches the process's anonymous memory, or PyTorch's on a GPU; ``before_mib`` and ``peak_mib``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before_mib = self.peak_mib = 0.0
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.before_mib = peak_mib(self.device) if self.device.startswith("cuda") else _anonymous_mib()
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


def _given(channels: Sequence[int], grid: Grid, size: int, mini_context_size: int, device: str) -> dict[str, Any]:
    """Arguments that most measurements share."""
    return {
        "channels": channels,
        "spatial_size": grid,
        "context_size": size,
        "mini_context_size": mini_context_size,
        "device": device,
    }


WORKS = {"forward": forward, "contexts": contexts, "memory": memory, "labels": labels, "volume": volume}

if __name__ == "__main__":
    main(WORKS)
