"""Pictures of cohorts."""

import pytest
from PIL import Image

from scripts.cohort_sheet import cohort_sheet


def test_a_sheet_is_written_once(tmp_path, capsys):
    path = tmp_path / "figures" / "sheet.png"
    cohort_sheet(str(path), cohorts=2, subjects=2, spatial_size=16, num_labels=2)
    assert "2 cohorts of 2 subjects" in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.width > sheet.height > 100 and len(sheet.getcolors()) > 10
    with pytest.raises(FileExistsError, match=r"sheet.png exists: .*--overwrite true"):
        cohort_sheet(str(path))
