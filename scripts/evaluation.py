"""Score predictions against references: ``metrics.csv``, ``summary.json`` and a table.

Segmentation: Dice, HD95 (the larger of the two directed 95th percentiles of the surface distance, in mm), NSD
(share of both surfaces that lies within 1 mm of the other) and volumes, per case and label. Voxels that the reference
says to ignore are left out: both masks are empty there. Surfaces of one slice are outlines in its plane. Generation:
PSNR, SSIM and MAE per case, both with the reference's own intensity range. All values come from ``monai.metrics``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import (
    MAEMetric,
    PSNRMetric,
    SSIMMetric,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.ndimage import find_objects
from scipy.stats import bootstrap
from tqdm import tqdm

from scripts.data.files import image_files
from scripts.data.grids import grid_difference, on_axes_of
from scripts.data.label_numbers import count_labels
from scripts.data.nnunet import ignored_labels
from scripts.data.volumes import ENDINGS, VolumeError, load_labels, load_volume, strip_ending
from scripts.runtime.output_folder import check_file, write_csv, write_json

METRICS = {"segmentation": ("dice", "hd95_mm", "nsd_1mm"), "generation": ("psnr_db", "ssim", "mae")}
VOLUMES = ("reference_volume_mm3", "predicted_volume_mm3")
NSD_TOLERANCE_MM = 1.0
SSIM_WINDOW_VOXELS = 11

ROUNDING_MM = 1e-3
"""Headers hold float32, so a 1 mm grid may say 1.00001 mm: that counts as within 1 mm."""

_UNDEFINED = {"segmentation": ("hd95_undefined", "hd95_mm", "dice"), "generation": ("psnr_undefined", "psnr_db", "mae")}


class Evaluation:
    """Pair the files of two folders by case name and score every pair.

    Args:
        prediction_dir: folder of predictions ``CASE.nii.gz`` (or ``.nii``, ``.mgz``, ``.nrrd``); other files in
            it are ignored.
        reference_dir: folder of references; the endings may differ. For generation ``CASE_0000.nii.gz`` is
            found too, if it is the only such file.
        output_dir: where ``metrics.csv`` and ``summary.json`` are written.
        task: ``"segmentation"`` or ``"generation"``.
        labels: label values to score; by default every value above 0 found in any file.
        num_bootstrap: resamples behind each 95 % interval.
        seed: of the bootstrap.
        overwrite: replace an earlier evaluation of this program in ``output_dir``.
        progress: show a progress bar over the cases.
        prediction_channel: read only the files ``CASE_000k`` of this channel k from ``prediction_dir``, as in an
            nnU-Net ``imagesTr``; the suffix is no part of the case's name then.
        reference_channel: the same for ``reference_dir``.
        ignore_label: value of the references' voxels that are not scored; None takes what ``"ignore"`` is in the
            ``dataset.json`` beside the references or one folder up, as nnU-Net has it, if there is any.

    Raises:
        ValueError: an unknown task, labels that are not positive integers, or a channel that is none.
    """

    def __init__(
        self,
        prediction_dir: str | os.PathLike | None,
        reference_dir: str | os.PathLike | None,
        output_dir: str | os.PathLike,
        task: str = "segmentation",
        labels: Sequence[int] | int | None = None,
        num_bootstrap: int = 2000,
        seed: int = 0,
        overwrite: bool = False,
        progress: bool = True,
        prediction_channel: int | None = None,
        reference_channel: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        if task not in METRICS:
            raise ValueError(f"task is {task!r}: give one of {', '.join(METRICS)}")
        self.prediction_dir, self.reference_dir = (Path(p) if p else None for p in (prediction_dir, reference_dir))
        self.output_dir = Path(output_dir)
        self.task = task
        self.labels = None if labels is None else sorted({int(n) for n in np.atleast_1d(labels)})
        if self.labels is not None and (not self.labels or self.labels[0] < 1):
            raise ValueError(f"labels is {labels}: give positive integers, or leave it out to score every label found")
        self.ignore_label = ignore_label
        self.num_bootstrap, self.seed = int(num_bootstrap), int(seed)
        self.overwrite, self.progress = overwrite, progress
        self.prediction_channel, self.reference_channel = prediction_channel, reference_channel
        for name, channel in (("prediction_channel", prediction_channel), ("reference_channel", reference_channel)):
            if channel is not None and channel not in range(10000):
                raise ValueError(f"{name} is {channel!r}: give the number k of CASE_000k, or leave it out")

    def run(self) -> dict[str, Any]:
        """Check all files, score all cases, write both files and print the table.

        The mean row of a segmentation averages the labels within a case first, then the cases, so that its
        interval too is over cases.

        Returns:
            The content of ``summary.json``; what is undefined is None.

        Raises:
            FileNotFoundError: a folder is missing or holds no predictions.
            FileExistsError: ``output_dir`` holds an evaluation and ``overwrite`` is off.
            ValueError: files that cannot be paired or compared, all of them named; or nothing to score.
            ImportError: a ``.nrrd`` file, and no pynrrd to read it.
        """
        if self.prediction_dir is None or self.reference_dir is None:
            raise ValueError("give --prediction_dir and --reference_dir, folders with one file per case")
        table_file, summary_file = self.output_dir / "metrics.csv", self.output_dir / "summary.json"
        for file in (table_file, summary_file):
            check_file(file, self.overwrite or file == summary_file, "--output_dir")
        self._ignored = self._ignored_labels()
        self._reordered: list[str] = []
        pairs, labels, unused = self._pair_and_check()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for case, files in tqdm(pairs.items(), "scoring", disable=not self.progress):
            rows += self._score(case, *files, labels)
        summary: dict[str, Any] = {"task": self.task, "num_cases": len(pairs)}
        if self.task == "segmentation":
            summary["labels"] = {str(n): self._statistics([r for r in rows if r["label"] == n]) for n in labels}
        summary |= {"mean": self._statistics(rows), "references_without_prediction": unused}
        if self._ignored:
            summary["ignored_labels"] = sorted(self._ignored)

        write_json(summary, summary_file)
        # last: where it is, the evaluation is complete
        write_csv(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows], table_file)
        print(_table_text(summary))
        if unused:
            have = "reference has" if len(unused) == 1 else "references have"
            print(f"{len(unused)} {have} no prediction: {_listed(unused)}")
        if self._ignored:
            print(
                f"not scored: voxels of the references with label {', '.join(map(str, sorted(self._ignored)))} (ignore)"
            )
        if self._reordered:
            print(
                f"stored along other axes than their references, and reordered without loss: {_listed(self._reordered)}"
            )
        print(f"written: {table_file} and {summary_file}")
        return summary

    def _pair_and_check(self) -> tuple[dict[str, tuple[Path, Path]], list[int], list[str]]:
        """Pairs of files by case, labels to score, names of references that no prediction belongs to.

        Every file is read once here, so that a fault is known before hours of scoring.
        """
        predictions = _files_by_case(self.prediction_dir, self.prediction_channel)
        references = _files_by_case(self.reference_dir, self.reference_channel)
        if not predictions:
            raise FileNotFoundError(
                f"no predictions{_of_channel(self.prediction_channel)} ({', '.join(ENDINGS)}) in "
                f"{self.prediction_dir}: give --prediction_dir the folder that inference wrote to"
            )
        pairs: dict[str, tuple[Path, Path]] = {}
        faults: list[str] = []
        found: set[int] = set()
        for case, paths in tqdm(predictions.items(), "checking", disable=not self.progress):
            matches = self._references_of(case, references)
            if len(paths) > 1 or len(matches) > 1:
                faults.append(f"{case}: several files ({', '.join(p.name for p in paths + matches)})")
            elif not matches:
                faults.append(f"{case}: no reference{_of_channel(self.reference_channel)} in {self.reference_dir}")
            else:
                pairs[case] = (paths[0], matches[0])
                try:
                    found |= self._check(case, *pairs[case])
                except ValueError as error:
                    faults.append(f"{case}: {error}")
        if faults:
            raise ValueError(f"{len(faults)} of {len(predictions)} cases cannot be evaluated: {'; '.join(faults)}")
        if self.task == "segmentation" and self.labels is None and not found:
            raise ValueError(f"no label above 0 in {self.prediction_dir} and {self.reference_dir}: nothing to score")
        used = {reference for _, reference in pairs.values()}
        unused = [name for name, paths in references.items() if used.isdisjoint(paths)]
        return pairs, self.labels or sorted(found), unused

    def _references_of(self, case: str, references: dict[str, list[Path]]) -> list[Path]:
        if case in references or self.task != "generation" or self.reference_channel is not None:
            return references.get(case, [])
        channel = re.compile(re.escape(case) + r"_\d{4}")
        return [path for name, paths in references.items() if channel.fullmatch(name) for path in paths]

    def _ignored_labels(self) -> set[int]:
        if self.task != "segmentation":
            return set()
        if self.ignore_label is not None:
            ignored = {int(self.ignore_label)}
        else:
            described = [
                folder / "dataset.json" for folder in (self.reference_dir, self.reference_dir.absolute().parent)
            ]
            ignored = next((ignored_labels(path) for path in described if path.is_file()), set())
        if both := sorted(ignored.intersection(self.labels or ())):
            raise ValueError(
                f"labels {both} are to be ignored: leave them out of --labels, or give --ignore_label another"
            )
        return ignored

    def _check(self, case: str, prediction_file: Path, reference_file: Path) -> set[int]:
        """Labels of a pair; ValueError if it cannot be compared."""
        prediction, reference, reordered = self._read_pair(prediction_file, reference_file)
        if reordered:
            self._reordered.append(case)
        if self.task == "generation":
            return set()
        return {n for volume in (prediction, reference) for n in count_labels(volume.as_tensor())} - self._ignored

    def _read_pair(self, prediction_file: Path, reference_file: Path) -> tuple[MetaTensor, MetaTensor, bool]:
        """Both ``(1, H, W, D)`` on the reference's voxels; and whether the prediction was reordered for it."""
        stored, reference = (self._read(path) for path in (prediction_file, reference_file))
        prediction = on_axes_of(stored, reference)
        if difference := grid_difference(prediction, reference):
            what, _, facts = difference.removeprefix("in ").partition(": ")
            if what == "shape":
                shape, wanted = (tuple(v.shape[1:]) for v in (prediction, reference))
                raise ValueError(f"shape {shape} differs from the reference's {wanted}")
            raise ValueError(f"{what} differs from the reference's: {facts}")
        return prediction, reference, prediction is not stored

    def _read(self, path: Path) -> MetaTensor:
        if self.task == "segmentation":
            try:
                return load_labels(path)
            except VolumeError as error:
                raise ValueError(f"{path.name} {error.reason}") from error
        volume = load_volume(path)
        if not np.isfinite(volume.numpy()).all():
            raise ValueError(f"{path.name} holds NaN or infinite values")
        return volume

    def _score(self, case: str, prediction_file: Path, reference_file: Path, labels: list[int]) -> list[dict[str, Any]]:
        both = self._read_pair(prediction_file, reference_file)[:2]
        prediction, reference = (volume[0].as_tensor().numpy() for volume in both)
        if self.task == "generation":
            return [{"case": case} | generation_metrics(prediction, reference)]
        if self._ignored:
            ignored = np.isin(reference, list(self._ignored))
            prediction, reference = (np.where(ignored, 0, volume) for volume in (prediction, reference))
        affine = np.asarray(both[1].affine, dtype=float)
        return [
            {"case": case, "label": n} | segmentation_metrics(prediction == n, reference == n, affine) for n in labels
        ]

    def _statistics(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Per metric: mean, 95 % interval and number of cases; and how often a distance or PSNR is undefined."""
        result: dict[str, Any] = {}
        for metric in METRICS[self.task]:
            by_case = defaultdict(list)
            for row in rows:
                if np.isfinite(row[metric]):
                    by_case[row["case"]].append(row[metric])
            values = np.array([np.mean(v) for v in by_case.values()])
            interval = None
            if len(values) > 1:
                how = {"n_resamples": self.num_bootstrap, "method": "percentile", "confidence_level": 0.95}
                resampled = bootstrap((values,), np.mean, rng=np.random.default_rng(self.seed), **how)
                interval = [_rounded(bound) for bound in resampled.confidence_interval]
            mean = _rounded(values.mean()) if len(values) else None
            result[metric] = {"mean": mean, "interval_95": interval, "num_cases": len(values)}
        name, metric, always_defined = _UNDEFINED[self.task]
        result[name] = sum(bool(np.isnan(r[metric]) and not np.isnan(r[always_defined])) for r in rows)
        return result


def segmentation_metrics(prediction: np.ndarray, reference: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """Metrics of one label.

    Args:
        prediction: mask, H W D.
        reference: mask of the same shape.
        affine: 4x4, voxel to mm.

    Returns:
        NaN metrics if both masks are empty; Dice and NSD 0 and a NaN distance if only one is.
    """
    voxel_volume_mm3 = abs(np.linalg.det(affine[:3, :3]))
    volumes_mm3 = [float(mask.sum() * voxel_volume_mm3) for mask in (reference, prediction)]
    if not (prediction.any() and reference.any()):
        value = 0.0 if prediction.any() or reference.any() else np.nan
        metrics = (value, np.nan, value)
    else:
        # the masks' common box gives the same values, much faster on a large scan: MONAI pads what it is given
        box = find_objects((prediction | reference).astype(np.uint8))[0]
        masks = [torch.from_numpy(np.ascontiguousarray(m[box]))[None, None] for m in (prediction, reference)]
        spacing = affine_to_spacing(affine)
        if 1 in prediction.shape:  # one slice: every voxel of it would lie on the surface of a 3D mask
            (across,) = np.flatnonzero(np.array(prediction.shape) == 1)[:1]
            masks = [mask.squeeze(2 + int(across)) for mask in masks]
            spacing = np.delete(np.asarray(spacing), across)
        on_surface = {"include_background": True, "spacing": np.asarray(spacing).tolist()}
        tolerance_mm = NSD_TOLERANCE_MM + ROUNDING_MM
        with warnings.catch_warnings():  # MONAI 1.6 uses an argument that it deprecates itself
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
            metrics = (
                compute_dice(*masks).item(),
                compute_hausdorff_distance(*masks, percentile=95, **on_surface).item(),
                compute_surface_dice(*masks, class_thresholds=[tolerance_mm], **on_surface).item(),
            )
    return dict(zip(METRICS["segmentation"] + VOLUMES, (*metrics, *volumes_mm3), strict=True))


def generation_metrics(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """PSNR in dB, SSIM and MAE of one volume, H W D.

    The data range is the reference's maximum minus its minimum. PSNR and SSIM are NaN for a constant reference,
    SSIM where an axis is too short for a window, PSNR where the two are equal (it is infinite there).
    """
    volumes = [torch.from_numpy(np.ascontiguousarray(v))[None, None] for v in (prediction, reference)]
    mae = MAEMetric()(*volumes).item()
    psnr_db = ssim = np.nan
    data_range = float(reference.max()) - float(reference.min())
    if data_range > 0:
        window = min(SSIM_WINDOW_VOXELS, (min(reference.shape) - 1) // 2 * 2 + 1)
        psnr_db = PSNRMetric(max_val=data_range)(*volumes).item()
        if window > 1:  # one voxel has no variance
            ssim = SSIMMetric(spatial_dims=3, data_range=data_range, win_size=window)(*volumes).item()
    return {"psnr_db": psnr_db if np.isfinite(psnr_db) else np.nan, "ssim": ssim, "mae": mae}


def _files_by_case(folder: Path, channel: int | None = None) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give --prediction_dir and --reference_dir existing folders")
    suffix = "" if channel is None else f"_{channel:04d}"
    files = defaultdict(list)
    for path in image_files(folder):
        name = strip_ending(path)
        if name.endswith(suffix) and name != suffix:
            files[name.removesuffix(suffix)].append(path)
    return dict(files)


def _of_channel(channel: int | None) -> str:
    return "" if channel is None else f" of channel {channel:04d}"


def _listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return f"{', '.join(names[:5])}{' ...' * (len(names) > 5)}"


def _rounded(value: float) -> float:
    return round(float(value), 6)  # MONAI computes in float32


def _cell(value: str | int | float) -> str | int | float | None:
    if not isinstance(value, float):
        return value
    return None if np.isnan(value) else _rounded(value)


def _table_text(summary: dict[str, Any]) -> str:
    """The summary as an aligned table: mean [95 % interval] of each metric, a row per label and the mean row."""
    metrics = METRICS[summary["task"]]
    undefined = _UNDEFINED[summary["task"]][0]
    lines = [["label" if "labels" in summary else "", "cases", *metrics, undefined]]
    for name, statistics in {**summary.get("labels", {}), "mean": summary["mean"]}.items():
        cells = [name, str(max(statistics[m]["num_cases"] for m in metrics))]
        for metric in metrics:
            mean, interval = statistics[metric]["mean"], statistics[metric]["interval_95"]
            cells.append("-" if mean is None else f"{mean:.3f}")
            cells[-1] += " [{:.3f}, {:.3f}]".format(*interval) if interval else ""
        lines.append([*cells, str(statistics[undefined])])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
