"""Our format: a plain state dict, and the network that follows from it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.checkpoint.files import CheckpointError, first_line, read_checkpoint
from scripts.networks import Neuroverse3D


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
        raise CheckpointError(f"{source} is not a complete Neuroverse3D network: {first_line(error)}") from error
    for parameter in network.parameters():
        parameter.data = parameter.data.float()  # float16 storage is allowed, computing in it is not meant
    return network.eval()


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
        raise CheckpointError(f"{source} is not a Neuroverse3D checkpoint: {misfit(error)}") from error


def misfit(error: Exception) -> str:
    """Why tensors are not those of a network, from the error that looking through them ended with."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) if isinstance(error, ValueError) else "an entry is no tensor of the expected shape"
