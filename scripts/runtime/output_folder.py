"""The rule of every output: what this program did not write, it never writes over or deletes.

A folder's own record says what was written into it: ``FOLDER/.neuroverse3d/written.jsonl`` gets a line with a file's
name and the SHA-256 of its coming content *before* the file is put in place, so that a process killed in between
leaves no file without a record. A file is ours if the record has its name with the digest of its present content: one
that somebody put there, or changed since, is not, and stays.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.runtime import atomic_files as atomic

logger = logging.getLogger(__name__)

STATE = ".neuroverse3d"
"""Folder in an output folder, with its record and its locks."""
_RECORD, _LOCK = "written.jsonl", "lock"
_TEMPORARY = f"{STATE}-"
_NAME_BYTES = 150
_REMEMBERED = {".integrity.json", ".contexts.json", ".alignment.json"}
"""What runs remember of their inputs, under names of their own."""
_WAIT_SECONDS, _POLL_SECONDS = 60.0, 0.02
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet's formula may begin with."""

_placed: dict[str, tuple[int, ...]] = {}
"""What this process has put in place, and how to know it again without reading it."""
_folders: dict[Path, OutputFolder] = {}
_locks: set[int] = set()
_warned: set[Path] = set()


class OutputFolder:
    """A folder that results go to, with its record.

    Args:
        folder: made when something is first written.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.state = self.folder / STATE
        self._written: dict[str, set[str]] = {}
        self._patterns: set[str] = set()
        self._record_id: tuple[int, int] | None = None
        self._read_up_to = 0

    @classmethod
    def of(cls, path: str | os.PathLike) -> OutputFolder:
        """The folder whose record a file belongs in: the nearest one above it that has a record, else its own."""
        parents = Path(os.path.abspath(path)).parents
        folder = next((parent for parent in parents if (parent / STATE).is_dir()), parents[0])
        return _folders.setdefault(folder, cls(folder))

    def open(self) -> OutputFolder:
        """Make the folder; results below it go on its record."""
        self.state.mkdir(parents=True, exist_ok=True)
        return self

    def wrote(self, path: str | os.PathLike) -> bool:
        """Whether the record says that a file, as it is now, was written by this program; a link never was."""
        path = Path(os.path.abspath(path))
        found = signature(path)
        if found is None or path.is_symlink() or not path.is_file():
            return False
        if _placed.get(str(path)) == found:
            return True
        self._read()
        name = self._name(path)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns):
            return True
        return name in self._written and file_sha256(path) in self._written[name]

    def has_record_of(self, path: str | os.PathLike) -> bool:
        """Whether this program has ever written a file of this name, or was about to."""
        self._read()
        return self._name(Path(os.path.abspath(path))) in self._written

    def check(self, *paths: str | os.PathLike) -> None:
        """Refuse if something that this program did not write is where something is to be written.

        Raises:
            FileExistsError: it names what is there.
        """
        if foreign := [Path(path) for path in paths if os.path.lexists(path) and not self.wrote(path)]:
            raise FileExistsError(_refusal(foreign))

    def write(self, path: str | os.PathLike, fill: Callable[[str], Any], suffix: str = "") -> None:
        """Let ``fill`` write a temporary file, put it on record, and put it in place: whole or not at all.

        Args:
            path: the file, in this folder or below.
            fill: called with the temporary file's path.
            suffix: ending of the temporary file, for writers that choose a format by it.

        Raises:
            FileExistsError: there is something that this program did not write.
            OSError: the folder cannot be written or the disk is full; what was there is kept.
        """
        path = Path(os.path.abspath(path))
        self.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path, suffix) as temporary:
            fill(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~atomic.umask())
            self._note(self._line(path, temporary))
            try:
                _move_to_free_place(temporary, path)
            except FileExistsError:
                self.check(path)
                os.replace(temporary, path)
        _placed[str(path)] = signature(path)

    def claim(self, pattern: str, *paths: str | os.PathLike) -> None:
        """Put names on record that something else than :meth:`write` writes to, or that grow.

        Args:
            pattern: as of :mod:`fnmatch`, from this folder.
            paths: files among them that are written over or added to.

        Raises:
            FileExistsError: one of them is there, and this program did not write it.
        """
        self.check(*paths)
        self._read()
        if pattern not in self._patterns:
            self._note({"pattern": pattern})

    def adopt(self, *paths: str | os.PathLike) -> None:
        """Put files on record that are known, by other evidence, to be of this program: of a version without record."""
        files = (path for path in map(Path, paths) if path.is_file() and not path.is_symlink())
        self._note(*(self._line(path, path) for path in files))

    def remove(self, *paths: str | os.PathLike) -> None:
        """Delete what this program wrote.

        Raises:
            FileExistsError: something else is among it; nothing is deleted.
        """
        self.check(*paths)
        for path in paths:
            Path(path).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Delete temporary files of processes that were killed; those of processes at work are locked."""
        self._read()
        folders = {self.folder, *(self.folder / os.path.dirname(name) for name in self._written)}
        for path in [path for folder in folders for path in folder.glob(f"{_TEMPORARY}*")]:
            with contextlib.suppress(OSError), _lock(path, make=False):
                path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out for a step of a moment; a process that holds the lock and never goes on is not waited for."""
        self.open()
        until = time.monotonic() + _WAIT_SECONDS
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(_lock(self.state / _LOCK))
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        logger.warning("a process holds %s and does not go on: not waited for", self.state / _LOCK)
                        break
                    time.sleep(_POLL_SECONDS)
            yield

    def at_work(self, name: str, shared: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Hold a lock for as long as a run is at work; the operating system lets go of it when the process ends.

        On a file system without locks a warning says so, and the run goes on.

        Args:
            name: of the lock.
            shared: others may hold it at the same time, if they share it, too.

        Raises:
            BlockingIOError: another run holds it.
        """
        self.open()
        return _lock(self.state / name, shared)

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)

    def _read(self) -> None:
        """Take in what was added to the record since it was last read."""
        try:
            with open(self.state / _RECORD, "rb") as record:
                status = os.fstat(record.fileno())
                if self._record_id != (status.st_dev, status.st_ino) or status.st_size < self._read_up_to:
                    self._written, self._patterns, self._read_up_to = {}, set(), 0
                    self._record_id = status.st_dev, status.st_ino
                record.seek(self._read_up_to)
                text = record.read()
        except FileNotFoundError:
            self._written, self._patterns, self._read_up_to = {}, set(), 0
            return
        whole = text[: text.rfind(b"\n") + 1]  # the last line may not be finished
        self._read_up_to += len(whole)
        for line_text in whole.splitlines():
            try:
                line = json.loads(line_text)  # one may have been cut short
                if "pattern" in line:
                    self._patterns.add(line["pattern"])
                else:
                    self._written.setdefault(line["file"], set()).add(line["sha256"])
            except (ValueError, KeyError, TypeError):
                continue

    def _line(self, path: Path, content: str | os.PathLike) -> dict[str, str]:
        return {"file": self._name(path), "sha256": file_sha256(content)}

    def _note(self, *lines: dict[str, str]) -> None:
        self.open()
        with open(self.state / _RECORD, "ab") as record:
            # begins with a line feed: the line before may have been cut short
            record.write(b"\n" + b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            record.flush()
            os.fsync(record.fileno())


def write_output(path: str | os.PathLike, fill: Callable[[str], Any], suffix: str = "") -> None:
    """Write a result; arguments and errors as of :meth:`OutputFolder.write`."""
    OutputFolder.of(path).write(path, fill, suffix)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write UTF-8 text as a result; errors as of :meth:`OutputFolder.write`."""
    write_output(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Write JSON as a result; NaN is refused, other errors as of :meth:`OutputFolder.write`."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], path: str | os.PathLike) -> None:
    """Write a table that spreadsheets show and do not execute.

    They take text that begins with one of :data:`FORMULA_SIGNS` as a formula, quoted or not. Names may begin so; they
    get an apostrophe in front (https://owasp.org/www-community/attacks/CSV_Injection). Numbers stay as they are, and
    what is not UTF-8 becomes question marks; a carriage return, which ``csv`` does not quote, becomes a space.

    Args:
        header: the columns' names.
        rows: cells in that order; None is an empty one.
        path: the file.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([inert(cell) for cell in row] for row in (header, *rows))
    write_text(text.getvalue().encode(errors="replace").decode(), path)


def inert(cell: Any) -> Any:
    """A table's cell as spreadsheets show it and do not execute it; numbers stay as they are."""
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", " ")
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA_SIGNS) else cell


def check_file(path: str | os.PathLike, overwrite: bool, option: str) -> None:
    """Refuse a result's place, before any work, where something is that may not be replaced.

    Args:
        path: the file to be written.
        overwrite: a file that this program wrote may be replaced.
        option: the option that gives another place.

    Raises:
        FileExistsError: there is something.
    """
    if not os.path.lexists(path):
        return
    if not OutputFolder.of(path).wrote(path):
        raise FileExistsError(_refusal([Path(path)], option))
    if not overwrite:
        raise FileExistsError(f"{path} exists: give another {option} or --overwrite true")


def foreign_files(folder: str | os.PathLike) -> list[Path]:
    """Files and links in a folder, and below it, that this program did not write, or that were changed since."""
    found = []
    for parent, folders, files in os.walk(folder):
        if STATE in folders:
            folders.remove(STATE)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        owner = OutputFolder.of(os.path.join(parent, STATE))
        found += [Path(parent, name) for name in links]
        found += [
            Path(parent, name)
            for name in files
            if name not in _REMEMBERED and not name.startswith(_TEMPORARY) and not owner.wrote(Path(parent, name))
        ]
    return sorted(found)


def check_folder(folder: str | os.PathLike, overwrite: bool, option: str = "--output_dir") -> None:
    """Refuse a place for a whole folder, before any work, where something is that may not be replaced.

    Args:
        folder: the folder to be made.
        overwrite: a folder that this program made, and nobody added to, may be replaced.
        option: the option that gives another place.

    Raises:
        FileExistsError: there is something.
    """
    folder = Path(folder)
    if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(_refusal([folder], option))
    if not overwrite:
        raise FileExistsError(f"{folder} exists: give another {option} or --overwrite true")
    if foreign := foreign_files(folder):
        names = _listing([path.relative_to(folder) for path in foreign])
        raise FileExistsError(
            f"{folder} also holds {names}, which this program did not write, or which was changed since: never "
            f"deleted; move it away or give another {option}"
        )


def put_folder_in_place(made: Path, folder: Path, aside: Path) -> None:
    """Record a complete folder's files in it and rename it to its place; what is there, if it is ours, goes aside.

    Args:
        made: the complete folder, on the file system of ``folder``.
        folder: its place.
        aside: free path on the same file system; removing it is up to the caller.

    Raises:
        FileExistsError: there is something that this program did not write; it stays.
        OSError: a rename fails; ``folder`` is as it was.
    """
    output = OutputFolder(made)
    output.adopt(*(path for path in sorted(made.rglob("*")) if STATE not in path.parts))

    def check(before: Path) -> None:  # where nobody adds to it any more
        if foreign := foreign_files(before):
            raise FileExistsError(_refusal([folder / path.relative_to(before) for path in foreign]))

    if folder.is_symlink():
        raise FileExistsError(_refusal([folder]))
    atomic.put_folder_in_place(made, folder, aside, check)


def _refusal(paths: list[Path], option: str = "--output_dir") -> str:
    what = "was not written by this program, or was" if len(paths) == 1 else "were not written by this program, or were"
    return f"{_listing(paths)} {what} changed since: never written over; move it away or give another {option}"


def _listing(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


@contextlib.contextmanager
def _lock(path: Path, shared: bool = False, make: bool = True) -> Iterator[bool]:
    """Hold the operating system's lock on a file; False where the file system has none.

    Raises:
        BlockingIOError: another holds it.
    """
    handle = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
    _locks.add(handle)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            got = True
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno not in _NO_LOCKS or not make:
                raise
            if path.parent not in _warned:
                logger.warning(
                    "the file system of %s has no locks (%s): see to it yourself that no two runs write there at once",
                    path.parent.parent,
                    error.strerror,
                )
            _warned.add(path.parent)
            got = False
        yield got
    finally:
        if handle in _locks:
            _locks.remove(handle)
            os.close(handle)


def _let_go_in_child() -> None:
    """A loading process that outlives a killed run for some seconds does not hold the run's locks."""
    for handle in _locks:
        with contextlib.suppress(OSError):
            os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def _temporary(later: Path, suffix: str) -> Iterator[str]:
    """A temporary file beside its later place, locked while it is written so that nobody takes it for a leftover."""
    # the random part comes after a dot: torch puts what is before it into the file, which is to be the same each time
    prefix = f"{_TEMPORARY}{os.fsdecode(os.fsencode(later.name)[:_NAME_BYTES])}."
    handle, path = tempfile.mkstemp(dir=later.parent, prefix=prefix, suffix=suffix)
    _locks.add(handle)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        try:
            Path(path).unlink(missing_ok=True)
        finally:  # a file that stays is a leftover, which the next run may take away
            _locks.discard(handle)
            with contextlib.suppress(OSError):
                os.close(handle)


def _move_to_free_place(temporary: str, path: Path) -> None:
    """Rename without writing over anything that appeared in the meantime.

    Raises:
        FileExistsError: there is something.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(path) from error
        os.replace(temporary, path)


def signature(path: str | os.PathLike) -> tuple[int, ...] | None:
    """What tells a file from another one that took its place, without reading it; None for no file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def placed_here(path: str | os.PathLike) -> bool:
    """Whether a file is the very one that this process put there."""
    found = signature(path)
    return found is not None and _placed.get(os.path.abspath(path)) == found
