"""SIGTERM: what `docker stop`, Slurm and service managers send some time before they kill."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

STATUS = 128 + signal.SIGTERM
"""Exit status of a program that SIGTERM ended."""


def exit_on_sigterm() -> None:
    """End the program by ``SystemExit`` when SIGTERM comes, so that half-written files are cleaned up.

    Without a handler the first process of a container never sees the signal. Does nothing outside the main thread,
    where Python takes no handlers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit)


class StopRequest:
    """While this context lasts, SIGTERM only sets :attr:`made`; the work ends where it can be continued.

    A second SIGTERM ends the program at once.
    """

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> StopRequest:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(signal.SIGTERM, _exit)


def leave_sigterm_to_the_trainer(worker_id: int) -> None:
    """``worker_init_fn`` of training: loading processes take SIGTERM from the process that trains and from no other.

    torchrun, Slurm and shells send it to all processes of a run; without its loader the group in hand, after which the
    trainer stops, would never be over. The trainer itself sends it to loaders that it no longer needs. Seeds random
    transforms as MONAI does, whose function this replaces.

    Args:
        worker_id: number of the process.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    from monai.data.utils import worker_init_fn  # the container's entry point imports this file, and not MONAI

    worker_init_fn(worker_id)


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _exit(number: int, frame: FrameType | None) -> None:
    print("\nstopped by SIGTERM", file=sys.stderr)
    raise SystemExit(STATUS)
