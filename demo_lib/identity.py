"""Which process is meant: a text for it that no clock, restart or other machine makes wrong."""

import hashlib
import os
import socket
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

LINUX = sys.platform == "linux"


def identity(pid: int) -> str:
    """Return what tells a process of this machine from all others: `HOST:MACHINE:BOOT:NAMESPACE:PID:START`.

    On Linux START is in clock ticks since the boot, see proc(5), which setting the clock does not change. Elsewhere it
    is in seconds since 1970, and BOOT and NAMESPACE are empty. `psutil.NoSuchProcess` if there is no such process.
    """
    return ":".join([*_system(), str(pid), _start(pid)])


def lives(identity: str) -> bool | None:
    """Whether the process lives; None if that can't be known here, as of another machine or container."""
    *system, pid, start = ["", "", *identity.split(":")][-6:]
    if not (pid + start).isdecimal():
        return None
    here = _system()
    if system != here:  # where the machine was started again, nothing of before lives
        restarted = system[:2] == here[:2] and here[1] and system[2] != here[2]
        return False if restarted else None
    if not psutil.pid_exists(int(pid)):
        return False
    try:
        if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return False
        now = _start(int(pid))
    except psutil.Error:  # it just ended, or is another user's and hidden
        return None
    return now == start if LINUX else abs(int(now) - int(start)) < 2 or None  # the clock was set, or it is a later one


def torchrun_processes() -> int:
    """Return how many processes torchrun started for this program, this one among them; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _start(pid: int) -> str:
    if not LINUX:
        return f"{psutil.Process(pid).create_time():.0f}"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        raise psutil.NoSuchProcess(pid) from None


def _system() -> list[str]:
    """Return host, machine, boot and PID namespace. Without a known address, `getnode` is another one each time."""
    machine, boot, namespace = str(uuid.getnode()), "", ""
    if LINUX:
        machine, boot = "", Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
        with suppress(OSError):  # containers have none
            machine = Path("/etc/machine-id").read_text().strip()
    # machine-id(5): others must not see the number itself.
    return [socket.gethostname(), machine and hashlib.sha256(machine.encode()).hexdigest()[:8], boot, namespace]
