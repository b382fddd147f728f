"""A contact sheet of synthetic cohorts, to see what training draws from.

Command line::

    python -m scripts.cohort_sheet --output_file cohorts.png [--label_maps MAPS]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import trange

from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.data.synthesis.label_map_anatomy import LabelMaps
from scripts.reporting.pictures import GroupView, contact_sheet, group_figure, save_png
from scripts.runtime.options import flag, normalise
from scripts.runtime.output_folder import check_file

_SIDE_PX = 1200


def cohort_sheet(
    output_file: str,
    cohorts: int = 8,
    subjects: int = 4,
    spatial_size: int | Sequence[int] = 64,
    num_labels: int = 4,
    label_maps: str | None = None,
    held_out_maps: Sequence[str] | None = None,
    label_map_share: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Draw cohorts as rows of subjects, their labels in colour.

    Args:
        output_file: the PNG file.
        cohorts: how many cohorts.
        subjects: how many subjects of each.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labels.
        label_maps: folder of label maps of real subjects whose anatomies to use; made up without.
        held_out_maps: names of label maps, without ending, that are not used.
        label_map_share: share of the cohorts that comes from label_maps.
        seed: cohort i is that of the seeds (seed, i), as in ``scripts.synthesize``.
        overwrite: replace the file.
    """
    path = Path(output_file)
    check_file(path, flag(overwrite), "--output_file")
    maps = None
    if label_maps is not None:
        maps = LabelMaps(normalise("label_maps", label_maps), normalise("held_out_maps", held_out_maps) or ())
    grid, figures = normalise("spatial_size", spatial_size), []
    for number in trange(cohorts, desc="cohorts", unit="cohort"):
        cohort = synthesize_cohort(
            (seed, number), subjects, grid, num_labels, label_maps=maps, label_map_share=label_map_share
        )
        view = GroupView(", ".join(cohort.names), cohort.images[:, 0], cohort.labels[:, 0])
        names = [f"subject {subject + 1}" for subject in range(subjects)]
        figures.append(group_figure([view], names, generation=False, title=f"cohort {number}"))
    sheet = contact_sheet(figures)
    sheet.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    save_png(sheet.quantize(64), path)
    print(f"{path}: {cohorts} cohorts of {subjects} subjects")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(cohort_sheet)
