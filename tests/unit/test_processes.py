"""A process that is owned ends with its owner, in whatever way, and says how it ended; what children print is shown."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

from demo_lib.ops.guard import alive
from demo_lib.ops.processes import OwnedProcess, examine_all, live_output

import psutil
import pytest

from tests.tools.processes import PATIENCE, normal_signals, wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="uses a shell")
OWNER = """
import os, subprocess, time
from demo_lib.ops.processes import OwnedProcess
owned = OwnedProcess(["sleep", "1000"], subprocess.DEVNULL, os.environ)
print(owned._guard.pid, flush=True)
time.sleep(1000)
"""


def own(*command, log=subprocess.DEVNULL, **options):
    return OwnedProcess(command, log, os.environ, **options)


def below(guard, count=1):
    """Wait until so many processes have started, and return them."""
    guard = psutil.Process(guard)
    wait_until(lambda: len(guard.children(recursive=True)) == count)
    return guard.children(recursive=True)


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("true", 0)])
def test_the_exit_code_is_the_commands(command, code):
    owned = own("sh", "-c", command)
    wait_until(lambda: owned.exit_code is not None)
    assert owned.exit_code == code


def test_a_group_that_does_not_want_to_end_is_killed():
    with own("sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000; true", patience=1) as owned:
        started = below(owned._guard.pid, 3)
    assert not any(map(alive, started))


def test_a_fork_of_the_owner_is_no_owner():
    owned = own("sleep", "1000")
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
    fork.start()
    owned._guard.stdin.close()  # as it is when the owner is killed
    wait_until(lambda: owned.exit_code is not None, 60)
    fork.kill()
    fork.join()


def test_it_outlives_the_thread_that_started_it_but_not_its_guard_that_is_told_to_end():
    owned = []
    thread = threading.Thread(target=lambda: owned.append(own("sleep", "1000")))
    thread.start()
    thread.join()
    (process,) = below(owned[0]._guard.pid)
    time.sleep(0.5)
    assert alive(process) and owned[0].exit_code is None
    owned[0]._guard.send_signal(signal.SIGTERM)
    wait_until(lambda: owned[0].exit_code is not None)
    assert not alive(process)


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_it_ends_with_its_owner(end):
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "preexec_fn": normal_signals}
    with subprocess.Popen([sys.executable, "-c", OWNER], **quiet) as owner:
        (process,) = below(int(owner.stdout.readline()))
        owner.send_signal(getattr(signal, end))
    wait_until(lambda: not alive(process))


def test_what_children_write_is_printed_line_by_line_as_it_comes(monkeypatch):
    class Page(io.StringIO):
        def write(self, text):
            times.append(time.monotonic())
            return super().write(text)

    times, page = [], Page()
    child = "import sys, time; print('first', flush=True); time.sleep(1); print('second', file=sys.stderr)"
    monkeypatch.setattr(sys, "stdout", page)
    with live_output():
        subprocess.run([sys.executable, "-c", child], check=True)
    assert page.getvalue() == "first\nsecond\n"
    assert times[-1] - times[0] > 0.9


def test_in_a_terminal_children_write_as_they_are_and_output_comes_back_after_an_error(capfd, monkeypatch):
    with pytest.raises(ZeroDivisionError), live_output():
        raise ZeroDivisionError
    os.write(2, b"an error")
    assert capfd.readouterr() == ("", "an error")
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with live_output():
        os.write(2, b"an error")
    assert capfd.readouterr() == ("", "an error")


def test_a_check_that_hangs_does_not_keep_the_others():
    end = threading.Event()
    checks = {
        "hangs": lambda: str(end.wait(60)),
        "works": lambda: "fine",
        "fails": Mock(side_effect=ValueError("why\nand more")),
    }
    hangs, works, fails = examine_all(checks, 0.5)
    end.set()
    assert str(hangs).startswith("FIX   hangs      no answer within 0.5 s")
    assert (works.ok, works.text) == (True, "fine") and (fails.ok, fails.text) == (False, "ValueError: why")
