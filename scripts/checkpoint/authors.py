"""The authors' layout: their names of the same tensors, inside a Lightning file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scripts.checkpoint.files import CheckpointError
from scripts.checkpoint.state import misfit
from scripts.networks import Neuroverse3D

AUTHORS_GRID = 128
"""Grid of the authors' published weights, voxels per axis."""

_PREFIX = "net."


def from_authors(content: Any, source: str) -> dict[str, Tensor]:
    """State dict in our names from the content of the authors' file.

    Raises:
        CheckpointError: a key is missing or left over.
    """
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(str(k).startswith(_PREFIX) for k in state):
        raise CheckpointError(f"{source} has no Lightning state_dict with '{_PREFIX}' keys")
    state = {k.removeprefix(_PREFIX): v for k, v in state.items()}
    try:
        widths = _network_options(state)
        with torch.device("meta"):
            ours = Neuroverse3D(**widths).state_dict()
        names = {key: authors_key(key, len(widths["channels"])) for key in ours if key != "grid"}
        converted = {key: state.pop(theirs) for key, theirs in names.items()}
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source} is not a Neuroverse3D checkpoint: {misfit(error)}") from error
    if state:
        raise CheckpointError(f"{source} holds {len(state)} tensors that Neuroverse3D has no place for: {min(state)}")
    return converted | {"grid": torch.tensor((AUTHORS_GRID,) * 3)}


def to_authors(network: Neuroverse3D) -> dict[str, Any]:
    """Content of a Lightning file that the authors' scripts load."""
    stages = len(network.channels)
    state = {
        _PREFIX + authors_key(key, stages): value
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


def _network_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
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
