"""Scans that a client sends for a while, which are not to join the studies."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from monailabel.utils.sessions import SessionInfo, Sessions

from scripts.apps.monailabel.statuses import clear_statuses
from scripts.apps.monailabel.uploads import check_scan

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class CheckedSessions(Sessions):
    """MONAI Label's sessions, of one scan each; archives are refused, for unpacking may write anywhere."""

    def add_session(
        self, data_file: str, expiry: int = 0, uncompress: bool = False, session_id: str | None = None
    ) -> tuple[str, SessionInfo]:
        """As the base class.

        Raises:
            HTTPException: 422 not one scan.
        """
        with clear_statuses():
            if uncompress or not os.path.isfile(data_file):
                raise ValueError("a session takes one scan as one file, not an archive or several files")
            try:
                check_scan(data_file)
            except ValueError:
                os.unlink(data_file)
                raise
        return super().add_session(data_file, expiry, session_id=session_id)

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True) -> SessionInfo | None:
        """As the base class; None for what is not an id, or not of this folder."""
        if not _ID.fullmatch(session_id):
            return None
        found = super().get_session(session_id, update_ts, fetch_cache)
        return found if found and self.holds(found) else None

    def remove_session(self, session_id: str) -> None:
        """As the base class; nothing happens for what is not an id."""
        if _ID.fullmatch(session_id):
            super().remove_session(session_id)

    def remove_expired(self) -> int:
        """As the base class, which fails at a folder of another kind."""
        count = 0
        for item in os.listdir(self.store_path) if os.path.isdir(self.store_path) else ():
            found = self.get_session(item, update_ts=False, fetch_cache=False)
            if found and 0 < found.expiry < time.time() - found.last_access_ts:
                self.remove_session(item)
                count += 1
        return count

    def holds(self, session: SessionInfo) -> bool:
        """Whether a session's scan lies in its own folder."""
        folder = os.path.realpath(os.path.join(self.store_path, session.name))
        return Path(os.path.realpath(session.image)).is_relative_to(folder)
