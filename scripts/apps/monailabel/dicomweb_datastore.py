"""Scans and annotations of a DICOMweb server, with a folder store of them as its cache.

The server has the truth: a series is a scan, the newest DICOM segmentation of it its finished annotation. Both are in
the cache as NIfTI files on the series' voxels, so that whatever uses a folder of studies can use this one, with the
same checks. The cache may be removed at any time.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.datastore.utils.convert import binary_to_image
from pydicom import Dataset, dcmread

from scripts.apps.monailabel.annotations import FINAL, given_names
from scripts.apps.monailabel.checked_datastore import CheckedDatastore
from scripts.apps.monailabel.dicom_server import DicomServer, Listed
from scripts.apps.monailabel.segmentations import (
    Segment,
    SegmentationError,
    annotation,
    number_names,
    on_series,
    segments_of,
    series_of,
    unnamed,
    written_at,
)
from scripts.apps.monailabel.statuses import NotFoundError, clear_statuses
from scripts.apps.monailabel.uploads import incoming
from scripts.data.grids import on_axes_of
from scripts.data.label_numbers import label_numbers
from scripts.data.records import read_record, write_record
from scripts.data.volumes import VolumeError, load_exact, load_volume, strip_ending
from scripts.runtime.atomic_files import write_atomically

logger = logging.getLogger(__name__)

ENDING = ".nii.gz"
_FRAME = "FrameOfReferenceUID"
_COUNT = "instances"
_STATE = "made_from"


class DicomwebDatastore(CheckedDatastore):
    """Series and segmentations of a server.

    Ids of scans are SeriesInstanceUIDs. The server is asked for its lists when a client asks for them
    (``/info/``, ``/datastore/``) or for a scan that is not in them, and when they are older than ``expiry_s``. A series
    is downloaded when it is first needed, or when the number of its instances has changed; a segmentation once.

    Args:
        server: the server.
        search_filter: which series are scans, such as ``{"Modality": "MR"}``.
        cache: folder, which holds patients' scans; made if missing, for the user alone.
        expiry_s: how long lists are taken for current.
    """

    def __init__(self, server: DicomServer, search_filter: dict[str, Any], cache: Path, expiry_s: float) -> None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(str(cache), ["*" + ENDING], auto_reload=False)
        self.server = server
        self.search_filter = search_filter
        self.expiry_s = expiry_s
        self._cache = cache
        self._sync = FileLock(cache / ".dicomweb.lock")  # a training looks as well
        self._asked_at = float("-inf")
        self._listed: dict[str, Listed] = {}
        self._unreadable: dict[str, tuple[int | None, str]] = {}
        self._instances: dict[str, tuple[int | None, list[str]]] = {}
        self._names: dict[int, str] = {}
        self._elsewhere: tuple[str, ...] = ()

    # --- what there is

    def name(self) -> str:
        """The server's address."""
        return str(self.server.client.base_url)

    def refresh(self) -> None:
        """Ask the server for its lists, and bring the annotations up to date with it."""
        with self._sync:
            super().refresh()
            found = self.server.series(self.search_filter)
            self._listed = {one.series: one for one in found if one.info["Modality"] != "SEG"}
            self._settle()
            self._asked_at = time.monotonic()

    def list_images(self) -> list[str]:
        """Ids of all series that match the filter."""
        self._keep_current()
        return list(self._listed)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of those that have a finished annotation."""
        self._keep_current()
        return [image for image in super().get_labeled_images() if image in self._listed]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of those that have none, and are not known to be no volume."""
        labeled = set(self.get_labeled_images())
        return [image for image in self._listed if image not in labeled and image not in self._unreadable]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Finished annotations and their scans, as the base class."""
        self._keep_current()
        return [entry for entry in super().datalist(full_path) if strip_ending(entry["image"]) in self._listed]

    def status(self) -> dict[str, Any]:
        """As the base class, with what is passed over."""
        self.refresh()
        return super().status() | {"passed_over": [*self.passed_over, *self._elsewhere]}

    def json(self) -> dict[str, Any]:
        """As the base class, with the series that are not downloaded yet."""
        self.refresh()
        found = super().json()
        waiting = {one.series: one.info for one in self._listed.values()}
        waiting = {image: {"image": {"ext": ENDING, "info": info}, "labels": {}} for image, info in waiting.items()}
        return found | {"objects": waiting | {i: entry for i, entry in found["objects"].items() if i in waiting}}

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """As the base class, with what the server says."""
        said = self._listed[image_id].info if image_id in self._listed else {}
        return said | super().get_image_info(image_id)

    def get_image_uri(self, image_id: str) -> str:
        """Path of a scan, which is downloaded if need be; empty if the server has none of this id.

        Raises:
            VolumeError: the series is no volume.
        """
        self._keep_current()
        if image_id not in self._listed:
            self.refresh()
        if image_id not in self._listed:
            return ""
        with self._sync:
            return self._scan(self._listed[image_id])

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """As the base class, of the annotations that the server has."""
        self._keep_current()
        return super().get_label_uri(label_id, label_tag)

    # --- what is given

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As the base class; a finished annotation goes to the server as a DICOM segmentation.

        Bare voxels (``.bin``), as OHIF sends them, are those of the scan, 8 bits each.

        Raises:
            HTTPException: as the base class; 422 also for names that DICOM cannot hold, 503 if the server refuses.
        """
        if not label_filename.endswith(".bin"):
            return super().save_label(image_id, label_filename, label_tag, label_info)
        with incoming(label_filename):
            scan = self.get_image_uri(image_id)
            if not scan:
                raise NotFoundError(f"no image {image_id!r} among the studies")
            file = binary_to_image(scan, label_filename)
        try:
            return super().save_label(image_id, file, label_tag, label_info)
        finally:
            Path(file).unlink(missing_ok=True)

    @clear_statuses()
    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refused: scans go to the server."""
        raise ValueError("send scans to the DICOM server: they appear here when the list is asked for")

    @clear_statuses()
    def remove_image(self, image_id: str) -> None:
        """Refused: DICOMweb removes nothing."""
        raise ValueError("remove scans at the DICOM server: they go from here when the list is asked for")

    @clear_statuses()
    def remove_label(self, label_id: str, label_tag: str) -> None:
        """As the base class, but for finished annotations: DICOMweb removes nothing."""
        if label_tag == FINAL:
            raise ValueError(
                "remove the segmentation at the DICOM server: it goes from here when the list is asked for"
            )
        super().remove_label(label_id, label_tag)

    def _keep_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        if label_tag != FINAL:
            return super()._keep_label(image_id, label_filename, label_tag, label_info)
        with self._sync:
            listed = self._listed[image_id]
            scan = load_volume(self._scan(listed))
            labels = label_numbers(on_axes_of(load_exact(label_filename), scan).as_tensor())[0].numpy()
            names = {int(v): self._names[v] for v in np.unique(labels) if v in self._names} | given_names(label_info)
            made = annotation(labels.T, names, self.server.headers(listed))
            self.server.store(made)
            self._settle(made)
        return image_id

    # --- what is in the cache

    def _keep_current(self) -> None:
        if time.monotonic() - self._asked_at > self.expiry_s:
            self.refresh()

    def _scan(self, listed: Listed) -> str:
        """Path of a series in the cache; it is downloaded if need be."""
        path = self._cache / f"{listed.series}{ENDING}"
        entry = self._datastore.objects.get(listed.series)
        if entry and path.is_file() and entry.image.info.get(_COUNT) == listed.instances:
            return str(path)
        known = self._unreadable.get(listed.series)
        if known is None or known[0] != listed.instances:
            self._unreadable.pop(listed.series, None)
            try:
                volume, header = self.server.volume(listed)
            except VolumeError as error:
                self._unreadable[listed.series] = listed.instances, error.reason
            else:
                write_atomically(path, lambda temporary: sitk.WriteImage(volume, temporary), ENDING)
                info = {"ts": int(time.time()), "name": path.name, _COUNT: listed.instances}
                info |= {_FRAME: str(header.get(_FRAME, ""))} | listed.info
                self._datastore.objects[listed.series] = ImageLabelModel(image=DataModel(ext=ENDING, info=info))
                self._update_datastore_file()
                return str(path)
        raise VolumeError(f"series {listed.series}", self._unreadable[listed.series][1])

    def _settle(self, new: Dataset | None = None) -> None:
        """Make the cache's finished annotations those of the server.

        Args:
            new: a segmentation that was just stored there, instead of asking for all.
        """
        record = self._cache / "segmentations.json"
        known = read_record(record)
        known = self._look_at_all(known) if new is None else known | {str(new.SOPInstanceUID): self._look_at(new)}
        by_age = sorted(known, key=lambda uid: (known[uid]["written"], uid))
        lines, chosen = [], {}
        for uid in reversed(by_age):
            series = known[uid]["series"]
            if series not in self._listed or series in chosen:
                continue
            if problem := known[uid]["problem"] or self._convert(uid, known[uid]):
                lines.append(f"segmentation {uid} of series {series} is passed over: {problem}")
            else:
                chosen[series] = uid
        write_record(known, record)
        segments = {uid: {int(n): Segment(*said) for n, said in known[uid]["segments"].items()} for uid in by_age}
        numbers = number_names([segments[uid] for uid in by_age if uid in chosen.values()])
        self._names = {number: name for name, number in numbers.items()}
        for series, uid in chosen.items():
            self._put_in_place(series, uid, {n: numbers[segment.name] for n, segment in segments[uid].items()})
        for series, entry in self._datastore.objects.items():
            if FINAL in entry.labels and series not in chosen:
                self._label_file(series).unlink(missing_ok=True)
                del entry.labels[FINAL]
        self._update_datastore_file()
        self._unreadable = {series: why for series, why in self._unreadable.items() if series in self._listed}
        lines += [f"series {series} is passed over: it {reason}" for series, (_, reason) in self._unreadable.items()]
        elsewhere = [
            f"segmentation {uid} is passed over: it is of no series that is listed here"
            for uid in by_age
            if known[uid]["series"] not in self._listed
        ]
        for line in sorted({*lines, *elsewhere} - {*self.passed_over, *self._elsewhere}):
            logger.warning("%s", line)
        self.passed_over, self._elsewhere = tuple(sorted(lines)), tuple(elsewhere)

    def _look_at_all(self, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Facts of all segmentations of the listed series' studies; those that are known are not downloaded again."""
        studies = {one.study for one in self._listed.values()}
        found = {}
        for one in self.server.series({"Modality": "SEG"}):
            if one.study not in studies:
                continue
            count, uids = self._instances.get(one.series, (None, []))
            if one.instances is None or one.instances != count:
                uids = self.server.instances(one)
                self._instances[one.series] = one.instances, uids
            for uid in uids:
                there = uid in known and self._segmentation_file(uid).is_file()
                found[uid] = known[uid] if there else self._look_at(self.server.instance(one, uid))
        for uid in known.keys() - found.keys():
            self._segmentation_file(uid).unlink(missing_ok=True)
            self._converted_file(uid).unlink(missing_ok=True)
        return found

    def _look_at(self, segmentation: Dataset) -> dict[str, Any]:
        """Keep a segmentation in the cache; what is to be known of it before it is converted."""
        uid = str(segmentation.SOPInstanceUID)
        path = self._segmentation_file(uid)
        write_atomically(path, lambda temporary: segmentation.save_as(temporary, write_like_original=False))
        segments, problem = {}, None
        try:
            segments = {str(n): [said.name, said.label] for n, said in segments_of(segmentation).items()}
        except SegmentationError as error:
            problem = str(error)
        except Exception as error:  # anybody may have made it
            problem = f"it cannot be read ({error})"
        facts = {"series": series_of(segmentation), "written": written_at(segmentation), "segments": segments}
        return facts | {"problem": problem, "converted": None}

    def _convert(self, uid: str, facts: dict[str, Any]) -> str | None:
        """Bring a segmentation to the voxels of its series, once; why it cannot be, if so."""
        listed = self._listed[facts["series"]]
        try:
            path = self._scan(listed)
        except VolumeError as error:
            return f"its series {error.reason}"
        if facts["converted"] and facts["converted"][_COUNT] == listed.instances:
            problem = facts["converted"]["problem"]
            if problem or self._converted_file(uid).is_file():
                return problem
        try:
            segmentation, scan = dcmread(self._segmentation_file(uid)), sitk.ReadImage(path)
            frames = {str(segmentation.get(_FRAME, "")), self._datastore.objects[listed.series].image.info[_FRAME]}
            if len(frames - {""}) > 1:
                raise SegmentationError("it lies in another frame of reference than its series")
            numbers = sitk.GetImageFromArray(on_series(segmentation, segments_of(segmentation), scan))
        except SegmentationError as error:
            problem = str(error)
        except OSError:
            raise
        except Exception as error:  # anybody may have made it
            problem = f"it cannot be read ({error})"
        else:
            problem = None
            numbers.CopyInformation(scan)
            write_atomically(self._converted_file(uid), lambda temporary: sitk.WriteImage(numbers, temporary), ENDING)
        facts["converted"] = {_COUNT: listed.instances, "problem": problem}  # for the series as it is now
        return problem

    def _put_in_place(self, series: str, uid: str, numbers: dict[int, int]) -> None:
        """Make a converted segmentation the finished annotation of its series, with label numbers for its segments'."""
        entry, path = self._datastore.objects[series], self._label_file(series)
        state = [uid, entry.image.info[_COUNT], sorted(numbers.items())]
        there = entry.labels.get(FINAL)
        if there and path.is_file() and there.info.get(_STATE) == state:
            return
        source = sitk.ReadImage(str(self._converted_file(uid)))
        table = np.zeros(max(numbers) + 1, np.min_scalar_type(max(numbers.values())))
        table[list(numbers)] = list(numbers.values())
        labels = sitk.GetImageFromArray(table[sitk.GetArrayFromImage(source)])
        labels.CopyInformation(source)
        write_atomically(path, lambda temporary: sitk.WriteImage(labels, temporary), ENDING)
        names = [
            {"name": self._names[n], "idx": n} for n in sorted(set(numbers.values())) if self._names[n] != unnamed(n)
        ]
        info = {"ts": int(time.time()), "name": path.name, "label_info": names, _STATE: state}
        entry.labels[FINAL] = DataModel(ext=ENDING, info=info)

    def _label_file(self, series: str) -> Path:
        return Path(self._datastore.label_path(FINAL), f"{series}{ENDING}")

    def _segmentation_file(self, uid: str) -> Path:
        return self._cache / "segmentations" / f"{uid}.dcm"

    def _converted_file(self, uid: str) -> Path:
        return self._cache / "segmentations" / f"{uid}{ENDING}"
