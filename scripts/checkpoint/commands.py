"""The command line: convert, export, compact, download."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.checkpoint.authors import from_authors, to_authors
from scripts.checkpoint.files import CheckpointError, atomic_save, first_line, read_checkpoint
from scripts.checkpoint.state import load_network, load_state, network_from_state
from scripts.networks import Neuroverse3D
from scripts.runtime.options import flag
from scripts.runtime.output_folder import check_file

AUTHORS_FILE_URL = "https://drive.google.com/uc?id=1ER_mV2CCsdnF-q3Aoy7loJ2DZXI95M9M"


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
                f"could not download the authors' weights ({first_line(error)}); fetch {AUTHORS_FILE_URL} in a "
                "browser and use `python -m scripts.checkpoint convert --source FILE`"
            ) from error
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        print(f"SHA-256 of the downloaded file: {digest}")
        convert(str(source), str(target), allow_pickle=allow_pickle, overwrite=overwrite)


def _size_text(network: Neuroverse3D) -> str:
    count = sum(p.numel() for p in network.parameters())
    return f"{count:,} parameters, channels {network.channels}, grid {tuple(network.grid.tolist())}"
