"""Whole-head scans made of label maps of real people, as files: a target, and other people's scans as its contexts.

Of the label maps published with SynthSeg (Billot et al. 2023, Medical Image Analysis 86), which hold what lies around
the brain too. Contrast, partial volume, bias field, blur and noise come from :mod:`scripts.data.synthesis.contrast`.
Every scan has a pose and a field of view of its own; world coordinates start from the middle of that field, so that
they tell nothing of where the head is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from scripts.data.preprocessing import bounding_box
from scripts.data.synthesis.anatomy import AIR, Anatomy
from scripts.data.synthesis.contrast import Contrast, draw_contrast, draw_image
from scripts.data.synthesis.label_map_anatomy import LabelMaps, map_names
from scripts.data.synthesis.seeded_draws import Draws
from scripts.data.synthesis.subject_pose import label_table, pool_labels
from scripts.runtime.atomic_files import write_json

STRUCTURES = {
    "lateral ventricle": (4, 43),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "third ventricle": (14,),
    "brain stem": (16,),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "ventral diencephalon": (28, 60),
}
"""Ten deep structures, left and right as one: values of FreeSurfer's table."""

HELD_OUT = ("brain_05", "brain_10", "brain_15", "brain_20")
"""People who are targets only."""

PARTS = {"development": HELD_OUT[:2], "reporting": HELD_OUT[2:]}
"""Who is a target of what."""

DEGREES, SHIFT_MM = 15.0, 8.0
"""How far a head is turned about each axis and moved along it, either way."""

CONTEXTS, TARGETS = "Dataset001_Contexts", "Dataset002_Target"
"""Folders of an episode."""

_VERSION = 1  # raised with every change after which the same settings give other scans
_MARGIN_MM = 12.0  # of air around an unturned head
_LOWEST_MM = 6.0  # of what is shown below the cerebellum at the least
_SUPERSAMPLING = 2
_INTENSITY = 1000  # of the brightest voxel: scans are stored as whole numbers
_CEREBELLUM = (7, 8, 46, 47)
_OTHER_SIDE = {2: 41, 3: 42, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54}
_OTHER_SIDE |= {25: 57, 26: 58, 28: 60, 30: 62, 136: 137, 163: 164}
_ELSE = 0.5  # mean of the tissues that a table does not have
_MEANS = {
    "T1": {
        **dict.fromkeys((4, 5, 14, 15, 24), 0.12),  # ventricles and fluid
        **{2: 0.80, 7: 0.78, 16: 0.72, 28: 0.67, 512: 0.66, 85: 0.62, 530: 0.60},  # white matter, stem, nerves
        **{3: 0.52, 8: 0.50, 10: 0.63, 11: 0.52, 12: 0.57, 13: 0.70, 17: 0.50, 18: 0.48, 26: 0.53},  # grey matter
        **{30: 0.35, 502: 0.30, 514: 0.35},  # vessels
        **{506: 0.15, 508: 0.30, 509: 0.45},  # eyes, lenses, mucosa
        **{507: 0.50, 511: 0.85, 515: 0.08, 516: 0.62},  # soft tissue, skin, dense and spongy bone
    },
    "T2": {
        **dict.fromkeys((4, 5, 14, 15, 24), 0.95),
        **{2: 0.35, 7: 0.35, 16: 0.38, 28: 0.40, 512: 0.40, 85: 0.40, 530: 0.40},
        **{3: 0.55, 8: 0.53, 10: 0.46, 11: 0.51, 12: 0.47, 13: 0.32, 17: 0.57, 18: 0.58, 26: 0.52},
        **{30: 0.20, 502: 0.10, 514: 0.20},
        **{506: 0.95, 508: 0.20, 509: 0.70},
        **{507: 0.30, 511: 0.50, 515: 0.05, 516: 0.40},
    },
}


@dataclass(frozen=True)
class Pose:
    """Where a head is in its scan.

    Attributes:
        degrees: turns about the axes to the right, to the front and up, one after the other.
        shift_mm: along the same axes.
        neck: share, from 0 to 1, of what is below the cerebellum that the field of view shows.
    """

    degrees: tuple[float, float, float]
    shift_mm: tuple[float, float, float]
    neck: float


@dataclass(frozen=True)
class Settings:
    """What the scans of an episode depend on.

    Attributes:
        person: the target.
        contrast: of the target: 0 is T1-like, 1 T2-like, every further one made up.
        context_contrast: of the contexts.
        contexts: how many.
        voxel_mm: edge of the voxels.
        seed: of everything that is drawn.
    """

    person: str
    contrast: int
    context_contrast: int
    contexts: int = 8
    voxel_mm: float = 1.5
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the episode's folder."""
        contexts = "" if self.context_contrast == self.contrast else f"_from_{contrast_name(self.context_contrast)}"
        return f"{self.person}_{contrast_name(self.contrast)}{contexts}"


@dataclass(frozen=True)
class Heads:
    """Whole heads as targets: every person of a part in each contrast.

    Attributes:
        label_maps: folder of the label maps published with SynthSeg.
        output_dir: for scans, which are used again, and predictions.
        part: development or reporting.
        contrasts: of every target: T1-like, T2-like, then made-up ones.
        voxel_mm: edge of the scans' voxels.
        seed: of people, contrasts and poses.

    Raises:
        ValueError: no such part.
    """

    label_maps: str
    output_dir: str
    part: str = "development"
    contrasts: int = 3
    voxel_mm: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {self.part!r}")

    def smallest(self) -> Heads:
        """Two contrasts in coarse voxels."""
        return replace(self, contrasts=2, voxel_mm=4.0)

    def settings(self, contexts: int = 8, other_contrast: bool = False) -> list[Settings]:
        """What to make.

        Args:
            contexts: how many.
            other_contrast: contexts are T1-like, targets are not.

        Raises:
            ValueError: no contrast but that of the contexts.
        """
        shown = range(int(other_contrast), self.contrasts)
        if not shown:
            raise ValueError(f"--contrasts {self.contrasts} leaves no target: give more")
        return [
            Settings(person, number, 0 if other_contrast else number, contexts, self.voxel_mm, self.seed)
            for person in PARTS[self.part]
            for number in shown
        ]


class HeadScenes:
    """Writes episodes, and keeps those that are there.

    Args:
        label_maps: folder of label maps with FreeSurfer's values.
        output_dir: where a folder for each episode goes.

    Raises:
        FileNotFoundError: no label maps there.
        ValueError: the folder lacks held-out people, or has nobody else.
    """

    def __init__(self, label_maps: str, output_dir: str | Path) -> None:
        self.folder, self.output_dir = label_maps, Path(output_dir)
        names = map_names(label_maps)
        if missing := sorted(set(HELD_OUT) - set(names)):
            raise ValueError(f"{label_maps} lacks {', '.join(missing)}: --label_maps takes the whole folder")
        self.others = [name for name in names if name not in HELD_OUT]

    def episode(self, settings: Settings) -> Path:
        """Folder with a target and its contexts; made unless it is there with the same settings.

        Raises:
            ValueError: more contexts than there are people for.
        """
        if settings.contexts > len(self.others):
            raise ValueError(f"{settings.contexts} contexts of {len(self.others)} people: ask for fewer")
        folder, record = self.output_dir / settings.name, self.output_dir / settings.name / "scene.json"
        wanted = asdict(settings) | {"version": _VERSION}
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["settings"] == wanted:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        draws = Draws((settings.seed, *settings.person.encode(), settings.contrast), 0)
        people = [self.others[i] for i in draws.order(len(self.others))[: settings.contexts]]
        poses = {}
        for number, person in enumerate((settings.person, *people)):
            own = Draws((settings.seed, *settings.person.encode(), settings.contrast), 1, number)
            contrast = self._contrast(settings, settings.context_contrast if number else settings.contrast)
            image, label, poses[person] = self.scan(own, person, contrast, settings.voxel_mm)
            dataset, kind = (folder / CONTEXTS, "Tr") if number else (folder / TARGETS, "Ts")
            _save(image, settings.voxel_mm, dataset / f"images{kind}" / f"{person}_0000.nii.gz")
            _save(label, settings.voxel_mm, dataset / f"labels{kind}" / f"{person}.nii.gz")
        classes = {"background": 0} | {name: value for value, name in enumerate(STRUCTURES, start=1)}
        description = {"channel_names": {"0": "scan"}, "labels": classes, "file_ending": ".nii.gz"}
        write_json(description | {"numTraining": len(people)}, folder / CONTEXTS / "dataset.json")
        # last, so that a folder without it is one whose making was cut short
        write_json({"settings": wanted, "poses": {name: asdict(pose) for name, pose in poses.items()}}, record)
        return folder

    def scan(self, draws: Draws, person: str, contrast: Contrast, voxel_mm: float) -> tuple[Tensor, Tensor, Pose]:
        """A scan of a person.

        Args:
            draws: of the scan.
            person: file name without ending.
            contrast: of the scan's tissues.
            voxel_mm: edge of the voxels.

        Returns:
            Image (H, W, D) in [0, 1] and label map of bytes (1 for the first class), both in RAS, and the pose.
        """
        pose = Pose(
            tuple(draws.uniform(-DEGREES, DEGREES, 3).tolist()),
            tuple(draws.uniform(-SHIFT_MM, SHIFT_MM, 3).tolist()),
            draws.number(),
        )
        seen = self._see(person, pose, voxel_mm / _SUPERSAMPLING)
        image = draw_image(draws, seen, torch.ones_like(seen, dtype=torch.bool), contrast, _SUPERSAMPLING)
        return image, _pooled(seen, self._anatomy.labels), pose

    def _see(self, person: str, pose: Pose, point_mm: float) -> Tensor:
        """Tissue numbers at the points of a scan's field of view."""
        subject = self._maps.subjects[self._maps.names.index(person)]
        spacing = subject.spacing_mm.double()
        turn = torch.from_numpy(Rotation.from_euler("xyz", pose.degrees, degrees=True).as_matrix())
        shift = torch.tensor(pose.shift_mm, dtype=torch.float64)
        structures = torch.tensor([t for label in self._anatomy.labels for t in label])
        counts = subject.counts[structures, None]
        pivot = (counts * subject.centroids[structures]).sum(0) / counts.sum()
        cerebellum = torch.tensor([self._numbers[v] for v in _CEREBELLUM if v in self._numbers], dtype=torch.long)
        coarse = subject.tissues[::2, ::2, ::2]
        head = (2 * coarse.nonzero() - pivot) * spacing
        shown = (2 * torch.isin(coarse, torch.cat([structures, cerebellum])).nonzero() - pivot) * spacing
        low, high = head.amin(0) - _MARGIN_MM, head.amax(0) + _MARGIN_MM
        lowest = (shown @ turn.T + shift)[:, 2].amin() - _LOWEST_MM
        low[2] = lowest + pose.neck * (torch.minimum(head[:, 2].amin(), lowest) - lowest)
        size = (_SUPERSAMPLING * ((high - low) / point_mm / _SUPERSAMPLING).ceil()).long().tolist()
        back = turn.T / spacing[:, None]
        first = back @ (low + point_mm / 2 - shift) + pivot
        seen = ndimage.affine_transform(subject.tissues.numpy(), back.numpy() * point_mm, first.numpy(), size, order=0)
        return torch.from_numpy(seen)  # beyond the map there is air

    def _contrast(self, settings: Settings, number: int) -> Contrast:
        """The contrast that a number stands for, another draw for every target."""
        draws = Draws((settings.seed, *settings.person.encode(), number), 2)
        anatomy, tissues = self._anatomy, self._anatomy.tissues
        drawn = draw_contrast(draws, anatomy, (64, 64, 64), tissues)
        means = drawn.means
        if table := _MEANS.get(contrast_name(number)):
            left = {right: left for left, right in _OTHER_SIDE.items()}
            means = torch.tensor([table.get(left.get(int(v), int(v)), _ELSE) for v in self._maps.values])
        means[AIR] = draws.number(0.0, 0.03)
        return replace(
            drawn,
            means=means,
            spreads=draws.uniform(0.01, 0.05, tissues).index_fill_(0, torch.tensor([AIR]), 0.0),
            blur=draws.uniform(0.2, 0.6, 3),
            noise=draws.log_number(0.01, 0.04),
            bias=draws.number(0.05, 0.15),
            gamma=draws.log_number(0.85, 1.2),
            coarse=(0, 1.0),
            ghost=(0, 0, 0.0),
        )

    @cached_property
    def _maps(self) -> LabelMaps:
        return LabelMaps(self.folder)

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {int(value): number for number, value in enumerate(self._maps.values)}

    @cached_property
    def _anatomy(self) -> Anatomy:
        numbers = self._numbers
        labels = tuple(tuple(numbers[v] for v in values if v in numbers) for values in STRUCTURES.values())
        sides = tuple((numbers[b], numbers[a]) for a, b in _OTHER_SIDE.items() if a in numbers and b in numbers)
        return Anatomy((), (), (), labels, len(self._maps.values), sides, self._maps.kinds)


def contrast_name(number: int) -> str:
    """``T1``, ``T2``, ``random2`` and so on."""
    return (*_MEANS, *(f"random{i}" for i in range(len(_MEANS), number + 1)))[number]


def _pooled(seen: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """Label map (H, W, D) of bytes from tissue numbers at the points; ``labels`` as in :func:`label_table`."""
    table, s = label_table(labels), _SUPERSAMPLING
    answer = torch.zeros([n // s for n in seen.shape], dtype=torch.uint8)
    # most of a head has no label, and counting points is slow
    box = tuple(slice(low // s, (high + s - 1) // s) for low, high in bounding_box(table[seen.int()] > 0))
    points = tuple(slice(s * side.start, s * side.stop) for side in box)
    answer[box] = pool_labels(seen[points], table, s, len(labels))
    return answer


def _save(volume: Tensor, voxel_mm: float, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = -voxel_mm * (np.array(volume.shape) - 1) / 2
    voxels = volume.numpy()
    if volume.is_floating_point():
        voxels = np.rint(_INTENSITY * voxels).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, affine), path)
