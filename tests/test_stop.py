"""SIGTERM: at once outside training, a wish within a request."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from scripts.stop import StopRequest, exit_on_sigterm


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
        "import os, signal\nfrom scripts.commandline import main\n"
        "def f():\n    os.kill(os.getpid(), signal.SIGTERM)\nmain(f)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and "Traceback" not in done.stderr
