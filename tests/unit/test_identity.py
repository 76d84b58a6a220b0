"""A process is told from all others, and what can't be known is not guessed."""

import os
import subprocess
import sys
import time

from demo_lib import identity as module
from demo_lib.identity import identity, lives

import psutil
import pytest

from tests.tools.processes import wait_until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what /proc tells")
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_process_lives_until_it_is_killed_even_if_nobody_looked_at_its_end():
    child = subprocess.Popen(SLEEP)
    known = identity(child.pid)
    assert lives(known) is True
    child.kill()
    wait_until(lambda: lives(known) is False)  # a zombie
    child.wait(30)
    assert lives(known) is False


@LINUX
def test_setting_the_clock_changes_nothing(monkeypatch):
    known = identity(os.getpid())
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert lives(known) is True and identity(os.getpid()) == known


@LINUX
@pytest.mark.parametrize(
    ("part", "text", "expected"),
    [
        ("START", "1", False),  # a later process got the number
        ("HOST", "another", None),
        ("MACHINE", "0a1b2c3d", None),  # that calls itself as this one
        ("BOOT", "0a1b2c3d", False),  # before this machine was started again
        ("NAMESPACE", "1", None),  # another container
        ("PID", "x", None),
    ],
)
def test_only_what_is_sure_is_said(part, text, expected, monkeypatch):
    system = ["host", "machine", "boot", "4026531836"]
    monkeypatch.setattr(module, "_system", lambda: system)
    parts = identity(os.getpid()).split(":")
    parts[["HOST", "MACHINE", "BOOT", "NAMESPACE", "PID", "START"].index(part)] = text
    assert lives(":".join(parts)) is expected


@LINUX
def test_a_restart_is_not_guessed_where_the_machine_has_no_name(monkeypatch):
    monkeypatch.setattr(module, "_system", lambda: ["host", "", "boot", "1"])
    assert lives(f"host::other:1:{os.getpid()}:1") is None


@pytest.mark.parametrize("text", ["", ":", "host", "host:12:1760000000", "a:b:c:d:e:f:g", "::::-1:2"])
def test_what_others_wrote_is_not_guessed(text):
    assert lives(text) is None


@LINUX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a new PID namespace needs root")
def test_a_container_does_not_judge_processes_outside():
    code = f"from demo_lib.identity import *; print(lives({identity(os.getpid())!r}))"
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "None"
