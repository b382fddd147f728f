"""Checkpoint files <-> networks: ``files`` -> ``state`` (our format) -> ``authors`` (theirs) -> ``commands``.

In: a weights file, or a network. Out: a network, or a weights file.
May use: networks, runtime.

Our format is a plain ``state_dict`` of tensors, which is what MONAI's bundle specification, MONAI Label and
MONAI Deploy read. A checkpoint knows its own network: widths, stages and convs per block follow from the
tensor shapes, and the training grid travels along as the buffer ``grid``.

Command line::

    python -m scripts.checkpoint convert  --source neuroverse3D.ckpt --output models/neuroverse3d.pt
    python -m scripts.checkpoint export   --source models/model.pt --output for_authors.ckpt
    python -m scripts.checkpoint compact  --source runs/stage2/model.pt --output small.pt
    python -m scripts.checkpoint download --output models/neuroverse3d.pt
"""

from scripts.checkpoint.authors import AUTHORS_GRID, authors_key, from_authors, to_authors
from scripts.checkpoint.commands import AUTHORS_FILE_URL, compact, convert, download, export
from scripts.checkpoint.files import CheckpointError, atomic_save, read_checkpoint
from scripts.checkpoint.state import load_network, load_state, load_weights, network_from_state, network_options

__all__ = [
    "AUTHORS_FILE_URL",
    "AUTHORS_GRID",
    "CheckpointError",
    "atomic_save",
    "authors_key",
    "compact",
    "convert",
    "download",
    "export",
    "from_authors",
    "load_network",
    "load_state",
    "load_weights",
    "network_from_state",
    "network_options",
    "read_checkpoint",
    "to_authors",
]
