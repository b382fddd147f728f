"""SIGTERM: at once outside training, a wish within a request."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from scripts.runtime.termination import StopRequest, exit_on_sigterm


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_ends_the_program_with_its_status(handler, capsys):
    exit_on_sigterm()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143 and "stopped by SIGTERM" in capsys.readouterr().err


def test_a_request_is_noted_and_the_second_one_ends_the_program(handler):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.made
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_are_left_alone():
    made = []

    def work():
        exit_on_sigterm()
        with StopRequest() as request:
            made.append(request.made)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert made == [False]


def test_command_line_tools_clean_up():
    code = (
        "import os, signal\nfrom scripts.runtime.commandline import main\n"
        "def f():\n    os.kill(os.getpid(), signal.SIGTERM)\nmain(f)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and "Traceback" not in done.stderr


LOADING = """
import os, signal, sys
import torch
from scripts.runtime.termination import leave_sigterm_to_the_trainer
class Cases(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        if index == 6 and sys.argv[1] == "faulty":
            raise ValueError("a damaged case")
        return torch.zeros(1)
loader = torch.utils.data.DataLoader(Cases(), num_workers=2, worker_init_fn=leave_sigterm_to_the_trainer)
batches = iter(loader)
next(batches)
if sys.argv[1] == "others":
    killer = "import os, signal, sys; [os.kill(int(pid), signal.SIGTERM) for pid in sys.argv[1:]]"
    os.spawnl(os.P_WAIT, sys.executable, "python", "-c", killer, *(str(worker.pid) for worker in batches._workers))
print(sum(1 for _ in batches), flush=True)
"""


@pytest.mark.parametrize(("case", "status"), [("others", 0), ("faulty", 1)])
def test_loading_processes_end_with_the_trainer_and_not_before(case, status):
    """SIGTERM of others changes nothing; a trainer that fails still gets rid of them."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, case], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == ("999\n" if case == "others" else "") and ("a damaged case" in done.stderr) == bool(status)
