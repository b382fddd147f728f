"""Makes the two folders that ``monai-deploy package`` takes: the application and what is packaged as its model.

Command line::

    python -m scripts.apps.deploy.stage --checkpoint WEIGHTS.pt --context_dir DATASET --output_dir STAGED

``STAGED/app`` holds the bundle's code and its entry point, ``STAGED/models/neuroverse3d`` the weights, the chosen
context pairs and the settings. The application runs from there as it does in a package::

    python STAGED/app --input DICOM --output OUT --model STAGED/models

For research use only. Not a medical device.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from scripts.apps.deploy.model_folder import (
    CONTEXTS,
    OPTIONS,
    PACKAGED,
    SEGMENTS,
    SERIES,
    TUNING,
    WEIGHTS,
    WRITE_FLAGGED,
    ModelFolder,
    make_predictor,
)
from scripts.data.files import read_json
from scripts.data.nnunet import find_datasets
from scripts.inference.confidence import ConfidentInferer
from scripts.runtime.atomic_files import write_json, write_text
from scripts.runtime.commandline import main
from scripts.runtime.manifest import ROOT, revision
from scripts.runtime.options import flag, normalise
from scripts.runtime.output_folder import check_folder, put_folder_in_place

_CODE = ("configs/inference.json", "configs/metadata.json", "LICENSE")
_HERE = Path(__file__).resolve().parent


def stage(
    checkpoint: str,
    context_dir: str,
    output_dir: str,
    segments: str | None = None,
    series: str | None = None,
    labels: Any = None,
    context_size: int = 8,
    context_selection: str = "random",
    channel: int = 0,
    spacing: float | None = None,
    align: str | None = None,
    amp: bool | str = "auto",
    seed: int = 0,
    write_flagged: bool = True,
    tune: float = 0,
    overwrite: bool = False,
) -> None:
    """Make the folders to package, and prove that they make a predictor with the same context set.

    Args:
        checkpoint: weights.
        context_dir: nnU-Net dataset folder with the example pairs; those that are chosen are copied.
        output_dir: gets the folders app and models.
        segments: JSON file with the labels' DICOM codes, in dcmqi's form; None gives them private codes.
        series: JSON file with rules of the SDK's series selector; None takes the MR series, if there is one only.
        labels: as in inference.json.
        context_size: as in inference.json.
        context_selection: as in inference.json.
        channel: as in inference.json.
        spacing: as in inference.json.
        align: as in inference.json.
        amp: as in inference.json.
        seed: as in inference.json.
        write_flagged: write a segmentation of a series that is unlike every context, too, marked as such.
        tune: minutes for tuning the weights on the context set first, as in inference.json; what wins is packaged.
        overwrite: replace output_dir, if this program made it and nobody added to it.

    Raises:
        FileExistsError: output_dir is not empty.
        FileNotFoundError: no weights, contexts or settings file.
        ValueError: an option or file that is not usable.
    """
    folder = Path(str(output_dir))
    options = {
        "labels": labels,
        "context_size": context_size,
        "context_selection": context_selection,
        "channel": channel,
        "spacing": spacing,
        "align": align,
        "amp": amp,
        "seed": seed,
    }
    options = {name: normalise(name, value) for name, value in options.items()}
    check_folder(folder, flag(overwrite))
    chosen = make_predictor(Path(checkpoint), Path(context_dir), options)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as work:
        made = Path(work, "made")
        _copy_application(made / "app")
        packaged = ModelFolder(made / "models" / "neuroverse3d")
        weights, minutes = Path(checkpoint), normalise("tune", tune)
        if minutes:
            chosen.predictor.tune(minutes, Path(work, "tuned"))
            weights = Path(work, "tuned", WEIGHTS)
        options |= {WRITE_FLAGGED: flag(write_flagged)}
        _copy_model(packaged.path, chosen, weights, Path(context_dir), options)
        if minutes:
            write_json(chosen.predictor.tuned, packaged.path / TUNING)
        for file, name in ((segments, SEGMENTS), (series, SERIES)):
            if file is not None:
                shutil.copyfile(file, packaged.path / name)
        again = packaged.predictor()
        packaged.segments(again)
        _ = packaged.series_rules
        if packaged.hashes(again) != packaged.hashes(chosen):
            raise ValueError(f"{context_dir}: the copied contexts are not those that were chosen")
        write_json(packaged.hashes(again), packaged.path / PACKAGED)
        put_folder_in_place(made, folder, Path(work, "before"))
    print(f"{folder}: {len(again.context)} contexts, labels {again.label_values}")
    print(
        f"monai-deploy package {folder / 'app'} --config {folder / 'app' / 'app.yaml'} --models {folder / 'models'} "
        "--platform x86_64 --tag neuroverse3d:latest"
    )


def _copy_application(folder: Path) -> None:
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=_left_out)
    for name in _CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("__main__.py", "app.yaml", "requirements.txt"):
        shutil.copyfile(_HERE / name, folder / name)
    write_text(revision() + "\n", folder / "REVISION")


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Byte code, and the other applications."""
    left_out = shutil.ignore_patterns("__pycache__", "*.pyc")(folder, names)
    if Path(folder) == _HERE.parent:
        left_out |= set(names) - {_HERE.name, "__init__.py"}
    return left_out


def _copy_model(
    folder: Path, chosen: ConfidentInferer, checkpoint: Path, context_dir: Path, options: dict[str, Any]
) -> None:
    """Weights, the pairs of the context set as a dataset of its own, and the options that go with it."""
    context = chosen.context
    (dataset,) = find_datasets(context_dir)
    cases = {case["case"]: case for case in dataset.cases(options["channel"])}
    for name in context.names:
        for part, inside in (("image", "imagesTr"), ("label", "labelsTr")):
            source = Path(cases[name][part])
            (folder / CONTEXTS / inside).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / CONTEXTS / inside / source.name)
    description = dataset.root / "dataset.json"
    if description.is_file():
        content = read_json(description, dict, "expected nnU-Net's description of a dataset")
        write_json(content | {"numTraining": len(context)}, folder / CONTEXTS / "dataset.json")
    shutil.copyfile(checkpoint, folder / WEIGHTS)
    fixed = {"spacing": context.preprocessing.spacing_mm}  # fits all candidates, of which not all are copied
    if not context.chooses:
        fixed["context_size"] = len(context)
    write_json(options | fixed, folder / OPTIONS)


if __name__ == "__main__":
    main(stage)
