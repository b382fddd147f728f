"""Make synthetic training data: nnU-Net datasets whose cases are subjects of one anatomy each.

Command line::

    python -m scripts.synthesize --output_dir DATA --cohorts 20 --subjects 8
    python -m scripts.synthesize --output_dir DATA --cohorts 20 --subjects 8 --label_maps MAPS
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.data.synthesis.label_map_anatomy import LabelMaps
from scripts.runtime.options import flag, normalise


def synthesize(
    output_dir: str,
    cohorts: int = 20,
    subjects: int = 8,
    spatial_size: int | Sequence[int] = 64,
    num_labels: int = 4,
    modalities: int = 1,
    label_maps: str | None = None,
    held_out_maps: Sequence[str] | None = None,
    label_map_share: float = 1.0,
    spread: float | None = None,
    seed: int = 0,
    spacing_mm: float = 1.0,
    start_id: int = 900,
    overwrite: bool = False,
) -> None:
    """Write synthetic cohorts as nnU-Net datasets: ``Dataset900_Synthetic000``, ``Dataset901_Synthetic001`` and so on.

    Args:
        output_dir: folder to hold the datasets; made if missing.
        cohorts: how many datasets.
        subjects: how many cases in each.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labels; in some cohorts the last one is a lesion that some subjects lack.
        modalities: contrasts of every case, channels 0, 1 and so on.
        label_maps: folder of label maps of real subjects whose anatomies to use; made up without.
        held_out_maps: names of label maps, without ending, that are not used.
        label_map_share: share of the cohorts that comes from label_maps.
        spread: how far the subjects are put apart, from 0 (all in one pose) to 1; by default drawn, mostly high.
        seed: the same seed gives the same data.
        spacing_mm: edge length of a voxel.
        start_id: number of the first dataset.
        overwrite: replace datasets of the same name.
    """
    maps = None
    if label_maps is not None:
        maps = LabelMaps(normalise("label_maps", label_maps), normalise("held_out_maps", held_out_maps) or ())
    folders = write_cohorts(
        str(output_dir),
        cohorts,
        subjects,
        spatial_size=spatial_size,
        num_labels=num_labels,
        modalities=modalities,
        label_maps=maps,
        label_map_share=label_map_share,
        spread=spread,
        seed=seed,
        spacing_mm=spacing_mm,
        start_id=start_id,
        overwrite=flag(overwrite),
    )
    print(f"{output_dir}: {folders[0].name} … {folders[-1].name}, {len(folders)} x {subjects} cases")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(synthesize)
