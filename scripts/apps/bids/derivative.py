"""The derivative dataset: names, tables, sidecars, pages, and what it says of itself."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.apps.bids.tables import write_table
from scripts.data.bids import DESCRIPTION, BidsFile, dataset_name, file_name
from scripts.data.files import read_json
from scripts.data.nnunet import DatasetError
from scripts.data.volumes import strip_ending
from scripts.inference.probabilities import probability_folder
from scripts.reporting.report_page import write_page
from scripts.runtime.manifest import bundle_identity
from scripts.runtime.output_folder import OutputFolder, write_json, write_output, write_text

logger = logging.getLogger(__name__)

BIDS_VERSION = "1.11.0"
DESC = "icl"
"""Label of the entity ``desc``: in-context learning."""
_RAW, _EXAMPLES = "raw", "examples"
_IGNORED = ("*.html", "sub-*/figures", "group_*")
"""What the derivative holds beside what BIDS has names for."""
_FORM = "expected the sidecar of a segmentation"
_README = """{title}

Segmentations by Neuroverse3D {version}: labels of the scans in the source dataset, predicted from example scans
(Hu et al. 2025, Neuroverse3D: Developing In-Context Learning Universal Model for Neuroimaging in 3D, ICCV).

- sub-*/[ses-*/]anat/*_desc-{desc}_dseg.nii.gz: the segmentation, on the voxels of its scan
- *_dseg.tsv: what its numbers mean; *_dseg.json: which scan and which examples it was made of, volumes, expected Dice
- sub-*.html: pictures of a subject's segmentations, to be looked at before they are used
- group_volumes.tsv: volumes of all subjects

For research use only; not a medical device.
"""


class Derivative:
    """A derivative dataset that segmentations are written into.

    Args:
        folder: its root.
        raw: root of the dataset that the scans are of.
        examples: root of the example dataset, if it is BIDS.
        names: label number -> name.

    Raises:
        FileExistsError: the folder is the dataset itself.
    """

    def __init__(
        self, folder: str | Path, raw: str | Path, examples: str | Path | None = None, names: Mapping[int, str] = {}
    ) -> None:
        self.folder, self.raw = Path(os.path.abspath(folder)), Path(os.path.abspath(raw))
        if self.folder == self.raw:
            raise FileExistsError(f"{folder} is the dataset itself: give a folder for the derivative")
        self.roots = {_RAW: self.raw}
        if examples is not None and not Path(os.path.abspath(examples)).is_relative_to(self.folder):
            self.roots[_EXAMPLES] = Path(os.path.abspath(examples))
        self.names = dict(names)

    def open(self) -> None:
        """Make the folder and write what the dataset says of itself.

        Raises:
            FileExistsError: there is another dataset's description.
        """
        OutputFolder(self.folder).open()
        links = {name: self._link(root) for name, root in self.roots.items()}
        version, title = bundle_identity()["version"], f"{dataset_name(self.raw)}, segmented"
        of_raw = self.raw / DESCRIPTION
        doi = read_json(of_raw, dict, "expected BIDS's form").get("DatasetDOI") if of_raw.is_file() else None
        content = {
            "Name": title,
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "Neuroverse3D", "Version": version, "Description": "in-context segmentation"}],
            "SourceDatasets": [{"URL": links[_RAW]} | ({"DOI": doi} if isinstance(doi, str) else {})],
            "DatasetLinks": links,
            "HowToAcknowledge": "Hu, J. et al. Neuroverse3D. ICCV 2025. arXiv:2503.02410",
        }
        write_json(content, self.folder / DESCRIPTION)
        write_text("\n".join(_IGNORED) + "\n", self.folder / ".bidsignore")
        write_text(_README.format(title=title, version=version, desc=DESC), self.folder / "README.md")

    def segmentation(self, scan: BidsFile) -> Path:
        """File of a scan's segmentation."""
        return self._path(scan, "dseg", ".nii.gz")

    def check(self, scans: Iterable[BidsFile], overwrite: bool) -> None:
        """See that the segmentations of these scans can be written.

        Raises:
            DatasetError: those of two scans would be one file.
            FileExistsError: one is there of another scan.
        """
        first: dict[Path, BidsFile] = {}
        for scan in scans:
            path = self.segmentation(scan)
            if other := first.get(path):
                raise DatasetError(
                    f"{other.path.name} and {scan.path.name} would both be segmented as {path.name}: choose with "
                    "--suffix or --bids_filter_file"
                )
            first[path] = scan
            made_of = _read_sidecar(path).get("Sources")
            if made_of not in (None, [self.uri(scan.path)]) and not overwrite:
                raise FileExistsError(f"{path} was made of {', '.join(made_of)}: give another OUT or --overwrite")

    def write(self, scan: BidsFile, report: Mapping[str, Any], made: Path, overwrite: bool) -> bool:
        """Write all that there is of a scan: segmentation, table, probabilities, sidecars, picture.

        Args:
            scan: the scan.
            report: of the inference run that has it.
            made: output folder of that run.
            overwrite: replace a segmentation by other examples, weights or settings.

        Returns:
            Whether it was written; what somebody changed since is kept.

        Raises:
            FileExistsError: there is a segmentation by other examples, weights or settings.
        """
        case, path = case_name(scan), self.segmentation(scan)
        entry = report["cases"][case]
        before = _read_sidecar(path).get("Fingerprint")
        if before not in (None, report["fingerprint"]) and not overwrite:
            raise FileExistsError(
                f"{path} was made by other examples, weights or settings: give another OUT or --overwrite"
            )
        table, sidecar = self._path(scan, "dseg", ".tsv"), self._path(scan, "dseg", ".json")
        output = OutputFolder(self.folder)
        if changed := [file for file in (path, table, sidecar) if file.exists() and not output.wrote(file)]:
            logger.warning("%s was changed after it was written: all of its scan is kept as it is", changed[0])
            return False
        _copy(made / f"{case}.nii.gz", path)
        names = {value: self.names.get(value, f"label{value}") for value in report["labels"]}
        write_table(("index", "name"), names.items(), table)
        facts = self._facts(scan, report, entry)
        write_json(facts | {"Labels": _labels(names, entry)}, sidecar)
        for value, label in _entity_labels(names).items():
            source = probability_folder(made, case) / f"label_{value}.nii.gz"
            if source.is_file():
                _copy(source, self._path(scan, "probseg", ".nii.gz", label))
                own = {"Description": f"Score of {names[value]}, 0 to 1"}
                write_json(facts | own, self._path(scan, "probseg", ".json", label))
        if (made / f"{case}.png").is_file():
            _copy(made / f"{case}.png", self.folder / f"sub-{scan.entities['sub']}" / "figures" / f"{case}.png")
        return True

    def write_pages(self, scans: Sequence[BidsFile], report: Mapping[str, Any]) -> None:
        """Write a page for each subject, of these scans and of what the report has of others of the subject."""
        for subject in dict.fromkeys(scan.entities["sub"] for scan in scans):
            own = {
                kind: {
                    case: entry
                    for case, entry in report[kind].items()
                    if case == f"sub-{subject}" or case.startswith(f"sub-{subject}_")
                }
                for kind in ("cases", "failed")
            }
            page = report | own | {"targets": len(own["cases"]) + len(own["failed"])}
            title = f"sub-{subject}, {dataset_name(self.raw)}"
            write_page(page, self.folder, f"sub-{subject}.html", f"sub-{subject}/figures/", title)

    def uri(self, path: str | Path) -> str:
        """A file as a BIDS URI (``bids:raw:sub-01/anat/...``); the name alone of one in no known dataset."""
        path = Path(os.path.abspath(path))
        for name, root in sorted(self.roots.items(), key=lambda item: -len(item[1].parts)):
            if path.is_relative_to(root):
                return f"bids:{name}:{path.relative_to(root).as_posix()}"
        return path.name

    def _path(self, scan: BidsFile, suffix: str, ending: str, label: str | None = None) -> Path:
        entities = {"space": "orig"} | scan.entities | {"desc": DESC} | ({"label": label} if label else {})
        folder = self.folder / os.path.relpath(os.path.abspath(scan.path.parent), self.raw)
        return folder / file_name(entities, suffix, ending)

    def _link(self, root: Path) -> str:
        """A relative path within the dataset that the derivative is in, which moves with it; else an address here."""
        within = self.folder.is_relative_to(self.raw) and root.is_relative_to(self.raw)
        return f"{os.path.relpath(root, self.folder)}/" if within else root.as_uri()

    def _facts(self, scan: BidsFile, report: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        source, identity = self.uri(scan.path), bundle_identity()
        used = list(dict.fromkeys(name for names in entry["contexts"].values() for name in names))
        return {
            "Description": f"Segmentation from {len(used)} example scans by in-context learning",
            "Sources": [source],
            "SpatialReference": source,
            "Manual": False,
            "Contexts": [self.uri(name) if os.path.isabs(name) else name for name in used],
            "Similarity": entry.get("similarity"),
            "Flags": entry.get("flags", []),
            "Warnings": entry.get("warnings", []),
            "SoftwareName": identity["name"],
            "SoftwareVersion": identity["version"],
            "Weights": report["weights"]["sha256"],
            "Fingerprint": report["fingerprint"],
        }


def case_name(scan: BidsFile) -> str:
    """What an inference run calls a scan."""
    return strip_ending(scan.path) or ""


def _labels(names: Mapping[int, str], entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        str(value): {
            "Name": name,
            "VolumeMM3": entry["volumes_mm3"].get(str(value)),
            "ExpectedDice": entry.get("expected_dice", {}).get(str(value)),
            "Agreement": entry.get("agreement", {}).get(str(value)),
        }
        for value, name in names.items()
    }


def _entity_labels(names: Mapping[int, str]) -> dict[int, str]:
    """Label values -> labels of the entity ``label``: letters and digits of the names, each one's own."""
    found: dict[int, str] = {}
    for value, name in names.items():
        plain = re.sub(r"[^0-9A-Za-z]", "", name)
        found[value] = plain if plain and plain not in found.values() else f"{plain}{value}"
    return found


def _read_sidecar(segmentation: Path) -> dict[str, Any]:
    path = segmentation.with_name(segmentation.name.replace(".nii.gz", ".json"))
    return read_json(path, dict, _FORM) if path.is_file() else {}


def _copy(source: Path, path: Path) -> None:
    write_output(path, lambda temporary: shutil.copyfile(source, temporary), "".join(path.suffixes[-2:]))
