"""Merge the reports of a run that was split with ``--shard`` or torchrun.

The last shard to finish does it by itself; this is for afterwards, or for a look in between. Command line::

    python -m scripts.merge_reports --output_dir OUT
"""

from __future__ import annotations

from scripts.reporting.report_files import REPORT, ReportFiles
from scripts.runtime.options import flag
from scripts.runtime.shards import this_shard


def merge_reports(output_dir: str, partial: bool = False) -> None:
    """Write ``report.json``, ``report.html`` and ``volumes.csv`` of all shards together.

    Args:
        output_dir: output folder of the run.
        partial: do so although shards are missing or have not finished.
    """
    report = ReportFiles(str(output_dir), this_shard()).publish_merged(flag(partial))
    print(
        f"{output_dir}/{REPORT}: {len(report['cases'])} cases done, {len(report['failed'])} failed, of "
        f"{report['targets']} targets in {report['shards']} shards"
    )


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(merge_reports)
