"""The options of all workflows: meaning and type in one place.

`--help true` prints from this table, and values from a command line (where ``false`` arrives as a string
and ``32,48,32`` as a tuple) are brought to their type by it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

AUTO = "auto"
"""Of a switch: the program decides."""


class Option(NamedTuple):
    """One option: how its value is read, what it means, and what is taken where a configuration leaves it open."""

    kind: str
    meaning: str
    left_open: str = "None"


OPTIONS: dict[str, Option] = {
    # data
    "dataset_dir": Option(
        "path",
        "nnU-Net dataset folder, or a folder of Dataset* folders (training without it: synthetic cohorts); "
        "inference: the targets",
    ),
    "output_dir": Option("path", "where results go; training writes OUT/stage1 and OUT/stage2"),
    "cache_dir": Option("path", "preprocessed cases and the integrity record; safe to delete"),
    "datasets": Option("names", "datasets to use, by folder name or its Dataset001 part", "all"),
    "collection_file": Option("path", "JSON file of rows: dataset, channels, task, classes, weights"),
    "channel": Option("int", "input channel (modality), the number in CASE_0000", "every channel"),
    "sample_rate": Option("float", "fraction of each dataset's training subjects that is used"),
    "val_fraction": Option("float", "fraction of the subjects held out for validation (model selection)"),
    "test_fraction": Option("float", "fraction of the subjects kept out of training and validation altogether"),
    "split_file": Option(
        "path",
        "splits.json of an earlier run, or nnU-Net's splits_final.json, to split by; stage 2 takes stage 1's if it is "
        "there",
    ),
    "fold": Option("int", "with nnU-Net's splits_final.json as split_file: which fold, from 0"),
    "subject_pattern": Option(
        "pattern",
        "regular expression for the subject in case names, whose scans stay in one part",
        "BIDS's sub-LABEL",
    ),
    "skip_bad_cases": Option("flag", "go on without faulty cases instead of stopping"),
    "label_maps": Option("path", "folder of label maps whose anatomies synthetic cohorts may have"),
    "held_out_maps": Option("names", "label maps that are not used, by file name without ending"),
    "label_map_share": Option("float", "share of the synthetic cohorts that comes from label_maps"),
    "cohort_spread": Option(
        "numbers",
        "lowest and highest of how far a synthetic cohort's subjects are put apart, 0 to 1",
        "mostly far",
    ),
    "num_workers": Option("int", "data loading processes; 0 loads in the main process"),
    # grid
    "spatial_size": Option(
        "grid",
        "the network's grid in voxels, one number or three (right, anterior, superior); inference: regions have up to "
        "twice its voxels",
        "that of the weights, else 128",
    ),
    "spacing": Option(
        "float", "isotropic voxel size of the grid in mm, not of regions", "the largest case or context just fits"
    ),
    # network
    "channels": Option(
        "ints",
        "width of each network stage; what contradicts the weights is refused",
        "those of the weights, else 32, 64, 128, 256, 512",
    ),
    "convs_per_block": Option("count", "convolutions per residual unit", "those of the weights, else 2"),
    "mini_context_size": Option(
        "count", "context pairs run at once: more take more memory, and predict the same", "what fits into free memory"
    ),
    "cache_mb": Option(
        "float",
        "memory in MB for what of the contexts serves all targets (crops; with align off their first encoding); "
        "0 keeps none",
        "a quarter of free memory",
    ),
    "checkpoint": Option("path", "weights to use, in this bundle's format"),
    "init_checkpoint": Option("path", "weights to start from"),
    # training
    "epochs": Option("count", "epochs to train"),
    "groups_per_epoch": Option("count", "groups per epoch; every member of a group is the target once"),
    "val_groups": Option("count", "validation groups, the same at every validation"),
    "val_interval": Option("count", "epochs between validations"),
    "batch_size": Option("count", "groups per optimiser step"),
    "context_size": Option("range", "context pairs: a number; training: also [low, high], drawn once per epoch"),
    "val_context_size": Option("count", "context pairs in validation"),
    "max_classes": Option("count", "at most this many random classes are merged into one foreground"),
    "learning_rate": Option("float", "learning rate at the start"),
    "lr_patience": Option("int", "validations without gain before the learning rate is halved"),
    "grad_clip": Option("float", "gradient norm is clipped to this"),
    "loss_weight": Option("float", "factor on the smooth L3-L1 loss, besides that of a row"),
    "accumulation_steps": Option("count", "episodes whose gradients are added up before an optimiser step"),
    "amp": Option("switch", "autocast to bfloat16; auto: on GPUs and CPUs that are made for it, float32 elsewhere"),
    "amp_dtype": Option("text", "bfloat16, or float16 with scaled gradients for GPUs without bfloat16"),
    "activation_checkpointing": Option("flag", "recompute activations in the backward pass: less memory, more time"),
    "compile": Option("flag", "compile the network's parts with torch.compile (needs a C++ compiler)"),
    "evidence_share": Option(
        "float", "share of the segmentation groups whose images are shown as evidence of the labels"
    ),
    "unpair_fraction": Option("float", "last fraction of the epochs in which contexts take each other's labels"),
    "augment": Option("flag", "change training groups at random; the _prob options are probabilities"),
    "flip_prob": Option("float", "mirror, for each axis"),
    "rotate90_prob": Option("float", "turn by 90, 180 or 270 degrees, for each plane with two equal sides"),
    "member_rotate90_prob": Option("float", "turn so in one plane, each member on its own; meant for synthetic data"),
    "low_resolution_prob": Option("float", "keep every 2nd, 3rd or 4th voxel of one axis, and interpolate between"),
    "shift_prob": Option("float", "add or take up to 0.2 from the intensities; generation: of the output too"),
    "scale_prob": Option("float", "intensities times 0.9 to 1.1; generation: of the output too"),
    "noise_prob": Option(
        "float",
        "Gaussian noise on the image, up to 0.02; generation: up to 0.025, and with a half and a quarter of the "
        "probability 0.05 and 0.075",
    ),
    "elastic_prob": Option("float", "rotate by up to 0.3 rad, scale by up to 20 % (generation: 10), deform smoothly"),
    "image_invert_prob": Option("float", "invert images"),
    "label_invert_prob": Option("float", "segmentation: background for foreground"),
    "sobel_prob": Option("float", "segmentation: edges of the label for the label"),
    "morphology_prob": Option("float", "segmentation: dilate or erode the label by a voxel"),
    "gin_prob": Option("float", "see images through a random shallow network (GIN, arXiv 2111.12525)"),
    "early_stop": Option("flag", "stop when the validation loss no longer falls"),
    "early_stop_patience": Option("count", "validations without gain before stopping"),
    "image_interval": Option("int", "epochs between TensorBoard pictures, 0 for none"),
    "wandb": Option("flag", "also log to Weights & Biases (needs the package wandb)"),
    "resume": Option("flag", "continue the run in the output folder"),
    "overwrite": Option("flag", "replace results of this program that are already there, and nothing else"),
    "seed": Option("int", "seed of everything random: split, groups, choice of contexts, bootstrap"),
    "device": Option("device", "cuda, cuda:1 or cpu", "GPU, else CPU"),
    # tuning
    "minutes": Option("float", "tuning takes this long, alignment and decision included"),
    "steps": Option("count", "tuning: optimiser steps of each fold, whatever time they take"),
    "episode_size": Option("range", "tuning: context pairs of an episode, [low, high], as far as there are so many"),
    "flips": Option("flag", "tuning: mirror episodes; for structures without a side"),
    "tune": Option("float", "tune on the contexts for so many minutes first, once for a context set; 0 does not"),
    # inference and evaluation
    "target_images": Option("paths", "instead of dataset_dir: the scans, a list of files"),
    "context_dir": Option("path", "nnU-Net dataset folder with the example pairs (imagesTr, labelsTr)"),
    "context_images": Option("paths", "instead of context_dir: the example images, a folder or a list of files"),
    "context_labels": Option(
        "paths", "with context_images: their labels (generation: wanted outputs), a folder or a list in that order"
    ),
    "context_file": Option("path", "instead of context_dir: JSON list of pairs, [{image, label}, ...]"),
    "task": Option(
        "words",
        "inference: segmentation or generation; training: these tasks, of a collection file only these",
        "segmentation, or all rows",
    ),
    "labels": Option("ints", "label values to segment or score", "all there are"),
    "context_label_channel": Option("int", "generation: the contexts' channel that is the wanted output"),
    "context_selection": Option("text", "which contexts if there are more than context_size: random, first or similar"),
    "target_split": Option("text", "with split_file: which part of dataset_dir to run on", "test, of nnU-Net's val"),
    "shard": Option("text", "run on one part of the targets only: 3/16 is the third of sixteen, for job arrays"),
    "self_test": Option("flag", "predict every context from the others first: what Dice to expect of targets"),
    "ensemble": Option("count", "predictions per target from random halves of the contexts, averaged; 1 is one of all"),
    "align": Option(
        "text",
        "bring contexts to each target: off, affine or deformable; training: true or false",
        "deformable; generation: off",
    ),
    "evidence": Option("flag", "show the network how much each voxel speaks for a label, where contexts are aligned"),
    "refine": Option("flag", "of earlier versions; does nothing"),
    "overlays": Option("flag", "write a picture per case"),
    "probabilities": Option("flag", "also write the scores, a float file per case and label"),
    "prediction_dir": Option("path", "predictions to score, one file per case"),
    "reference_dir": Option("path", "reference labels (or images), same case names"),
    "prediction_channel": Option("int", "of prediction_dir read only CASE_000k of this channel k, as in imagesTr"),
    "reference_channel": Option("int", "of reference_dir read only CASE_000k of this channel k, as in imagesTr"),
    "ignore_label": Option(
        "int",
        "label of the references whose voxels are not scored",
        "ignore of the dataset.json beside the references or one folder up",
    ),
    # any
    "help": Option("flag", "list the options"),
    "debug": Option("flag", "full tracebacks"),
}


def default_text(name: str, value: Any) -> str:
    """An option's default in a configuration, for people.

    Args:
        name: the option.
        value: as the configuration has it: a value, None, or an expression.
    """
    place = re.fullmatch(r"\$@(bundle_root|output_dir) \+ '/([\w./]+)'", value) if isinstance(value, str) else None
    if place:
        return place[2] if place[1] == "bundle_root" else f"OUT/{place[2]}"
    if value is None or (isinstance(value, str) and value.startswith("$")):
        return OPTIONS[name].left_open
    return value if isinstance(value, str) else json.dumps(value)


def flag(value: Any) -> bool:
    """True or false from a boolean or from text in any case.

    Raises:
        ValueError: neither.
    """
    text = str(value).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no", "none"):
        return False
    raise ValueError(f"expected true or false, got {value!r}")


def switch(value: Any) -> bool | str:
    """As :func:`flag`, or :data:`AUTO`.

    Raises:
        ValueError: neither.
    """
    if str(value).strip().lower() == AUTO:
        return AUTO
    try:
        return flag(value)
    except ValueError:
        raise ValueError(f"expected {AUTO}, true or false, got {value!r}") from None


def normalise(name: str, value: Any) -> Any:
    """Bring an option's value to its type; None stays None.

    Raises:
        ValueError: the value does not fit; the message names the option.
    """
    option = OPTIONS[name]
    if option.kind in _SWITCHES:
        reader: Callable[[Any], Any] = _SWITCHES[option.kind]
    elif value is None or str(value).strip().lower() == "none":
        return None
    else:
        reader = _READERS[option.kind]
    try:
        return reader(value)
    except (ValueError, TypeError, SyntaxError, OverflowError) as error:
        raise ValueError(f"--{name} {value!r} is not a valid {option.kind} ({option.meaning}): {error}") from error


def _number(value: Any) -> float:
    return float(value)


def _whole(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError("not a whole number")
    return int(number)


def _sequence(value: Any) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("[", "(")):
            return list(ast.literal_eval(text))
        return [part for part in text.replace(",", " ").split() if part]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole_numbers(value: Any) -> list[int]:
    return [_whole(v) for v in _sequence(value)]


def _numbers(value: Any) -> list[float]:
    return [_number(v) for v in _sequence(value)]


def _grid(value: Any) -> list[int]:
    sizes = _whole_numbers(value)
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise ValueError("one or three positive numbers are needed")
    return sizes * 3 if len(sizes) == 1 else sizes


def _range(value: Any) -> int | list[int]:
    bounds = _whole_numbers(value)
    low, high = bounds[0], bounds[-1]
    if len(bounds) > 2 or not 1 <= low <= high:
        raise ValueError("one number >= 1, or [low, high]")
    return low if len(bounds) == 1 else [low, high]


def _count(value: Any) -> int:
    number = _whole(value)
    if number < 1:
        raise ValueError("at least 1 is needed")
    return number


def _names(value: Any) -> list[str]:
    return [str(v) for v in _sequence(value)]


def _pattern(value: Any) -> str:
    try:
        return re.compile(str(value)).pattern
    except re.error as error:
        raise ValueError(str(error)) from error


def _path(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        raise ValueError("one path is needed; quote it twice if it holds a comma: '\"a,b\"'")
    text = str(value)
    if "#" in text or "::" in text:  # MONAI turns the one into the other
        raise ValueError("a '#' in a path is read as a separator of config ids; rename or link the folder")
    return text


def _paths(value: Any) -> list[str]:
    listed = isinstance(value, (list, tuple)) or (isinstance(value, str) and value.strip().startswith("["))
    return [_path(path) for path in (_sequence(value) if listed else [value])]


def _device(value: Any) -> str:
    from scripts.runtime.processes import usable_device  # brings PyTorch, which most tools' --help can do without

    return str(usable_device(str(value)))


_SWITCHES: dict[str, Callable[[Any], Any]] = {"flag": flag, "switch": switch}
"""For these "none" is a value."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _whole,
    "count": _count,
    "float": _number,
    "ints": _whole_numbers,
    "numbers": _numbers,
    "grid": _grid,
    "range": _range,
    "names": _names,
    "path": _path,
    "paths": _paths,
    "text": str,
    "pattern": _pattern,
    "device": _device,
    "words": lambda value: value if isinstance(value, str) and not set(value) & set("[(,") else _names(value),
}
