"""Checkpoint files: read, convert, export, compact, download.

Our format is a plain ``state_dict`` of tensors, which is what MONAI's bundle specification, MONAI Label and
MONAI Deploy read. A checkpoint knows its own network: widths, stages and convs per block follow from the
tensor shapes, and the training grid travels along as the buffer ``grid``.

Command line::

    python -m scripts.checkpoint convert  --source neuroverse3D.ckpt --output models/neuroverse3d.pt
    python -m scripts.checkpoint export   --source models/model.pt --output for_authors.ckpt
    python -m scripts.checkpoint compact  --source runs/stage2/model.pt --output small.pt
    python -m scripts.checkpoint download --output models/neuroverse3d.pt
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.networks import Neuroverse3D
from scripts.runtime.options import flag
from scripts.runtime.output_folder import check_file, write_output

AUTHORS_GRID = 128
"""Grid of the authors' published weights, voxels per axis."""

AUTHORS_FILE_URL = "https://drive.google.com/uc?id=1ER_mV2CCsdnF-q3Aoy7loJ2DZXI95M9M"

_AUTHORS_PREFIX = "net."


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message names the file and the reason."""


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> Any:
    """Load a torch file without running any code in it.

    Args:
        path: the file.
        allow_pickle: unpickle arbitrary objects; only for files whose origin you trust.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, not a torch file, or it holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give --checkpoint / --source an existing file")
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:
        # torch reports a refused global, a cut zip archive and a foreign format each in its own way
        refused = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if refused or (isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)):
            what = f" ({refused[1]})" if refused else ""
            raise CheckpointError(
                f"{path} holds pickled objects{what} and was not loaded, because unpickling can run code; "
                "if you trust its origin, convert it with --allow_pickle"
            ) from error
        raise CheckpointError(f"{path} is not a readable checkpoint: it is truncated or of another format") from error


def atomic_save(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that leaves either the old file or the complete new one, never a part.

    Raises:
        FileExistsError: there is a file that this program did not write.
        OSError: the folder cannot be written or the disk is full; an existing file is kept.
    """

    def save(temporary: str) -> None:
        try:
            torch.save(obj, temporary)
        except (RuntimeError, OSError) as error:  # torch's zip writer reports a failed write as a RuntimeError
            free_mb = shutil.disk_usage(Path(temporary).parent).free / 1e6
            raise OSError(
                f"could not write {path}: is the disk full ({free_mb:.0f} MB free)? What was there before is kept"
            ) from error

    write_output(path, save)


def authors_key(key: str, stages: int) -> str:
    """Our state-dict key -> the authors' (without the ``net.`` prefix).

    Args:
        key: a parameter name of :class:`Neuroverse3D`.
        stages: number of stages; the bottleneck is the last encoder block there.
    """
    part, _, rest = key.partition(".")
    role = "context" if part == "context_unet" else "target"
    # In the authors' context U-Net every layer sits in a wrapper called "module"; in the target path only
    # the layers that read a context do.
    wrap = ".module" if role == "context" else ""
    conv = rf"{role}_conv{wrap}.layers."

    def residual(index: str, block: str) -> str:
        convs, kind = re.fullmatch(r"convs\.(\d+)\.(\w+)", index).groups()
        return f"{block}.{conv}{2 * int(convs)}.{kind}"

    name, _, tail = rest.partition(".")
    index, _, leaf = tail.partition(".")
    if name == "embedding":
        return f"{part}.{role}_embedding{wrap}.{tail}"
    if name == "output":
        return f"{part}.output_block.block.1.{tail}"
    if name == "head":
        convs, kind = re.fullmatch(r"convs\.(\d+)\.(\w+)", tail).groups()
        return f"{part}.output_block.block.0.layers.{2 * int(convs)}.{kind}"
    if name == "downs":
        return f"{part}.downsample_blocks.{index}.{role}_linear_layer{wrap}.{leaf.removeprefix('conv.')}"
    if name == "ups":
        return f"{part}.upsample_blocks.{index}.{role}_conv_layer{wrap}.{leaf.removeprefix('conv.')}"
    if name == "bottleneck":
        return residual(tail, f"{part}.enc_blocks.{stages - 1}")
    if part == "target_decoder":  # stage 0 is the bottleneck, the rest are decoder stages
        block = f"{part}.enc_blocks.0" if index == "0" else f"{part}.dec_blocks.{int(index) - 1}"
    else:
        block = f"{part}.dec_blocks.{index}" if name == "up_residuals" else f"{part}.enc_blocks.{index}"
    if name == "fusions":
        return f"{block}.combine_conv_{role}.module.{leaf.removeprefix('conv.')}"
    return residual(leaf, block)


def network_from_state(state: Mapping[str, Tensor], source: str = "the state dict") -> Neuroverse3D:
    """Build the network whose tensors these are and load them.

    Args:
        state: our state dict.
        source: what to call it in errors.

    Raises:
        CheckpointError: these are not a Neuroverse3D network's tensors.
    """
    shape = describe(state, source)
    try:
        with torch.device("meta"):  # no random initialisation for weights that are replaced at once
            network = Neuroverse3D(**shape)
        network.load_state_dict(dict(state), assign=True)
    except ValueError as error:
        raise CheckpointError(f"{source} is not a Neuroverse3D checkpoint: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{source} is not a complete Neuroverse3D network: {_first_line(error)}") from error
    for parameter in network.parameters():
        parameter.data = parameter.data.float()  # float16 storage is allowed, computing in it is not meant
    return network.eval()


def load_network(path: str | os.PathLike) -> Neuroverse3D:
    """Network in eval mode from a checkpoint in our format; its widths and grid come from the file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, not safe to load, or not in our format.
    """
    return network_from_state(load_state(path), str(path))


def load_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Our plain state dict from a file; says what to do when it is another kind of checkpoint.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, not safe to load, or not in our format.
    """
    content = read_checkpoint(path)
    if isinstance(content, dict) and "state_dict" in content:
        raise CheckpointError(
            f"{path} is in the authors' Lightning layout: convert it first with "
            f"`python -m scripts.checkpoint convert --source {path} --output OUT.pt`"
        )
    if isinstance(content, dict) and isinstance(content.get("network"), dict):
        content = content["network"]  # our last.pt, made for resuming
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    describe(content, str(path))
    return content


def load_weights(network: torch.nn.Module, path: str | os.PathLike) -> None:
    """Load a checkpoint in our format into a network; the network's own grid is kept.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, not safe to load, or of another network.
    """
    state = load_state(path)
    state["grid"] = network.grid
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        found = describe(state, str(path))
        raise CheckpointError(
            f"{path} has channels {list(found['channels'])} and {found['convs_per_block']} convs per block, the "
            f"network {list(network.channels)} and {network.convs_per_block}: leave --channels and "
            "--convs_per_block out to take them from the checkpoint"
        ) from error


def network_options(
    checkpoint: str | os.PathLike | None,
    channels: Sequence[int] | None = None,
    convs_per_block: int | None = None,
    spatial_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Constructor arguments of a run's network: the checkpoint's where there is one, else the options'.

    Args:
        checkpoint: weights to start from; one that does not exist (yet) is an error only when it is loaded.
        channels: asked-for widths, or None.
        convs_per_block: asked-for convolutions per block, or None.
        spatial_size: asked-for grid, or None for the checkpoint's; the one thing that may differ from it.

    Raises:
        ValueError: the options contradict the checkpoint.
    """
    present = checkpoint is not None and Path(checkpoint).is_file()
    found = describe(load_state(checkpoint), str(checkpoint)) if present else {}
    wanted = {"channels": tuple(channels) if channels else None, "convs_per_block": convs_per_block}
    for name, value in wanted.items():
        if value is not None and value != found.get(name, value):
            raise ValueError(f"--{name} {value} contradicts {checkpoint}, which has {found[name]}; leave --{name} out")
    given = {name: value for name, value in wanted.items() if value is not None}
    if spatial_size is not None:
        given["spatial_size"] = spatial_size
    return found | given


def convert(source: str, output: str, *, allow_pickle: bool = False, overwrite: bool = False) -> None:
    """Write the authors' Lightning checkpoint in our format.

    Args:
        source: the authors' ``.ckpt`` file.
        output: where to write our ``.pt`` file.
        allow_pickle: unpickle objects in the source; only for files whose origin you trust.
        overwrite: replace an existing output.
    """
    target = Path(output)
    check_file(target, flag(overwrite), "--output")
    content = read_checkpoint(source, allow_pickle=flag(allow_pickle))
    network = network_from_state(from_authors(content, source), str(source))
    atomic_save(network.state_dict(), target)
    print(f"{target}: {_size_text(network)}")


def from_authors(content: Any, source: str) -> dict[str, Tensor]:
    """State dict in our names from the content of the authors' file.

    Raises:
        CheckpointError: a key is missing or left over.
    """
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(str(k).startswith(_AUTHORS_PREFIX) for k in state):
        raise CheckpointError(f"{source} has no Lightning state_dict with '{_AUTHORS_PREFIX}' keys")
    state = {k.removeprefix(_AUTHORS_PREFIX): v for k, v in state.items()}
    try:
        widths = _authors_widths(state)
        with torch.device("meta"):
            ours = Neuroverse3D(**widths).state_dict()
        names = {key: authors_key(key, len(widths["channels"])) for key in ours if key != "grid"}
        converted = {key: state.pop(theirs) for key, theirs in names.items()}
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source} is not a Neuroverse3D checkpoint: {_misfit(error)}") from error
    if state:
        raise CheckpointError(f"{source} holds {len(state)} tensors that Neuroverse3D has no place for: {min(state)}")
    return converted | {"grid": torch.tensor((AUTHORS_GRID,) * 3)}


def export(source: str, output: str, *, overwrite: bool = False) -> None:
    """Write one of our checkpoints in the authors' layout.

    Args:
        source: our ``.pt`` file.
        output: where to write the ``.ckpt`` file.
        overwrite: replace an existing output.
    """
    target = Path(output)
    check_file(target, flag(overwrite), "--output")
    network = load_network(source)
    atomic_save(to_authors(network), target)
    print(f"{target}: {_size_text(network)}, authors' layout")


def to_authors(network: Neuroverse3D) -> dict[str, Any]:
    """Content of a Lightning file that the authors' scripts load."""
    stages = len(network.channels)
    state = {
        _AUTHORS_PREFIX + authors_key(key, stages): value
        for key, value in network.state_dict().items()
        if key != "grid"
    }  # fmt: skip
    return {
        "state_dict": state,
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.0.1",
        "hparams_name": "hparams",  # the constructor argument that gets the next entry
        "hyper_parameters": {
            "data_slice_only": False,  # 3D; their constructor reads it
            "nb_inner_channels": list(network.channels),
            "nb_conv_layers_per_stage": network.convs_per_block,
        },
    }


def compact(
    source: str | Sequence[str],
    output: str,
    *,
    spatial_size: int | Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one of our checkpoints with its numbers as float16: half the size, to hand on; computing stays in float32.

    Several are averaged, weight by weight: those that one training went through often do better so than the last one
    (model soups, Wortsman et al., ICML 2022).

    Args:
        source: our ``.pt`` file, ``last.pt`` too; or several, of networks of one shape.
        output: where to write the smaller ``.pt`` file.
        spatial_size: grid to use the weights on unless a command names another; None keeps that of the training.
        overwrite: replace an existing output.

    Raises:
        FileExistsError: the output exists.
        CheckpointError: networks of several shapes, one that cannot have such a grid, or a weight that is not finite
            or beyond float16's range.
    """
    from monai.utils import ensure_tuple, ensure_tuple_rep

    target = Path(output)
    check_file(target, flag(overwrite), "--output")
    name, (state, *others) = str(source), [load_state(path) for path in ensure_tuple(source)]
    for other in others:
        if {key: value.shape for key, value in other.items()} != {key: value.shape for key, value in state.items()}:
            raise CheckpointError(f"{name} are networks of several shapes, which have no average")
    state = {
        key: value if key == "grid" else torch.stack([value, *(other[key] for other in others)]).float().mean(0)
        for key, value in state.items()
    }
    if spatial_size is not None:
        state["grid"] = torch.tensor(ensure_tuple_rep(spatial_size, 3))
        name += f" with a grid of {spatial_size}"
    network = network_from_state(state, name)
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    lost = [key for key, value in state.items() if not value.isfinite().all()]
    if lost:
        raise CheckpointError(f"{source} has weights that float16 cannot hold, such as {lost[0]}")
    atomic_save(state, target)
    print(f"{target}: {_size_text(network)}, float16, {target.stat().st_size / 1e6:.1f} MB")


def download(output: str = "models/neuroverse3d.pt", *, overwrite: bool = False, allow_pickle: bool = False) -> None:
    """Fetch the authors' published weights, print their SHA-256 and convert them.

    The authors publish no checksum, so the printed one is for your own records.

    Args:
        output: where to write our ``.pt`` file.
        overwrite: replace an existing output.
        allow_pickle: unpickle objects in the authors' file, if it cannot be read safely.
    """
    from monai.apps.utils import download_url

    target = Path(output)
    check_file(target, flag(overwrite), "--output")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "neuroverse3D.ckpt"
        try:
            download_url(AUTHORS_FILE_URL, source)
        except Exception as error:  # gdown, urllib and MONAI each raise their own
            raise CheckpointError(
                f"could not download the authors' weights ({_first_line(error)}); fetch {AUTHORS_FILE_URL} in a "
                "browser and use `python -m scripts.checkpoint convert --source FILE`"
            ) from error
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        print(f"SHA-256 of the downloaded file: {digest}")
        convert(str(source), str(target), allow_pickle=allow_pickle, overwrite=overwrite)


def describe(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Constructor arguments of the network whose state dict this is.

    Raises:
        CheckpointError: these are not a Neuroverse3D network's tensors.
    """
    try:
        widths = [state["target_encoder.embedding.weight"].shape[0]]
        while f"target_encoder.residuals.{len(widths)}.convs.0.weight" in state:
            widths.append(state[f"target_encoder.residuals.{len(widths)}.convs.0.weight"].shape[0])
        widths.append(state["context_unet.bottleneck.convs.0.weight"].shape[0])
        convs = sum(re.fullmatch(r"target_decoder\.head\.convs\.\d+\.weight", k) is not None for k in state)
        return {
            "in_channels": state["target_encoder.embedding.weight"].shape[1],
            "out_channels": state["target_decoder.output.weight"].shape[0],
            "channels": tuple(widths),
            "convs_per_block": convs,
            "spatial_size": tuple(int(n) for n in state["grid"]),
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source} is not a Neuroverse3D checkpoint: {_misfit(error)}") from error


def _authors_widths(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = (re.match(r"context_unet\.enc_blocks\.(\d+)\.", key) for key in state)
    stages = 1 + max((int(block[1]) for block in blocks if block), default=0)
    first = "context_unet.enc_blocks.{}.context_conv.module.layers.0.weight"
    convs = [k for k in state if re.fullmatch(r"target_decoder\.output_block\.block\.0\.layers\.\d+\.weight", k)]
    return {
        "in_channels": state["target_encoder.target_embedding.weight"].shape[1],
        "out_channels": state["target_decoder.output_block.block.1.weight"].shape[0],
        "channels": tuple(state[first.format(stage)].shape[0] for stage in range(stages)),
        "convs_per_block": len(convs),
        "spatial_size": AUTHORS_GRID,
    }


def _size_text(network: Neuroverse3D) -> str:
    count = sum(p.numel() for p in network.parameters())
    return f"{count:,} parameters, channels {network.channels}, grid {tuple(network.grid.tolist())}"


def _misfit(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) if isinstance(error, ValueError) else "an entry is no tensor of the expected shape"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[min(1, len(lines) - 1)].strip() if lines else type(error).__name__


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main({"convert": convert, "export": export, "compact": compact, "download": download})
