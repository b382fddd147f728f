"""Group level: the volumes of all subjects in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.apps.bids.derivative import DESC
from scripts.apps.bids.tables import write_table
from scripts.data.bids import read_name
from scripts.data.files import read_json

TABLE = "group_volumes.tsv"
_FORM = "expected the sidecar of a segmentation"


def write_volumes(folder: str | Path, participants: Sequence[str] | None = None) -> tuple[Path, int]:
    """Write ``group_volumes.tsv``, and ``group_volumes.json`` that explains it: a row for each segmentation.

    Args:
        folder: the derivative.
        participants: labels of subjects, with ``sub-`` or without; None for all.

    Returns:
        The table's path and its number of rows.

    Raises:
        FileNotFoundError: no segmentations of them.
        DatasetError: a sidecar that cannot be read.
    """
    folder = Path(folder)
    wanted = None if participants is None else {label.removeprefix("sub-") for label in participants}
    found = []
    for path in sorted(folder.glob(f"sub-*/**/*_desc-{DESC}_dseg.nii.gz")):
        named = read_name(path)
        if named is not None and (wanted is None or named.entities["sub"] in wanted):
            sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
            found.append((named, read_json(sidecar, dict, _FORM)))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no segmentations of {participants or 'any subject'}: run participant first"
        )
    labels = {value: of["Name"] for _, sidecar in found for value, of in sidecar["Labels"].items()}
    values = sorted(labels, key=int)
    twice = {name for name in labels.values() if list(labels.values()).count(name) > 1}
    columns = {value: f"{labels[value]}_{value}" if labels[value] in twice else labels[value] for value in values}
    rows = []
    for named, sidecar in found:
        of = sidecar["Labels"]
        expected = [of[value].get("ExpectedDice") for value in of]
        known = [dice for dice in expected if dice is not None]
        rows.append(
            [
                f"sub-{named.entities['sub']}",
                f"ses-{named.entities['ses']}" if "ses" in named.entities else None,
                named.path.relative_to(folder).as_posix(),
                *(of.get(value, {}).get("VolumeMM3") for value in values),
                round(min(known), 4) if known else None,
                "; ".join(sidecar.get("Flags", [])) or None,
            ]
        )
    meaning = {
        "participant_id": {"Description": "Subject"},
        "session_id": {"Description": "Session"},
        "segmentation": {"Description": "File of the segmentation, from the root of this dataset"},
        **{columns[v]: {"Description": f"Volume of label {v}, {labels[v]}", "Units": "mm^3"} for v in values},
        "lowest_expected_dice": {"Description": "Lowest Dice to expect of the labels, from 0 to 1, after a self-test"},
        "flags": {"Description": "Why the segmentation needs a look"},
    }
    write_table(list(meaning), rows, folder / TABLE, meaning)
    return folder / TABLE, len(rows)
