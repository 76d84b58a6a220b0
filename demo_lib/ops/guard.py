"""Run a command until its owner is gone, then end it with all its processes: `python guard.py SECONDS COMMAND...`.

The owner holds the other end of this program's standard input. When that closes, the owner is gone, however it ended;
this works on every system and from any thread. A program of its own, so that it starts in no time.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil


def end_group(leader: int, seconds: float = 15) -> None:
    """End every process of the group, first by asking, and after `seconds` by force; wait until they are gone."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        members = group(leader)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                end(member)
        await_end(members, seconds)


def await_end(processes: list[psutil.Process], seconds: float) -> None:
    """Wait until they are gone, for so long at most. Zombies count as gone: their parent has not looked yet."""
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    """Whether the process runs and is no zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def group(leader: int) -> list[psutil.Process]:
    """Return the living processes of the group; on Windows, which has no groups, the leader and its descendants."""
    if os.name != "posix":
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(leader)
            return [found, *found.children(recursive=True)]
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and alive(process):
                found.append(process)
    return found


def main(seconds: float, command: list[str]) -> int:
    """Run the command and return its exit code."""
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: end.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def follow_owner() -> None:
        os.read(0, 1)  # nothing comes but the end; sys.stdin would hold its lock when the command ends first
        end.set()

    threading.Thread(target=follow_owner, daemon=True).start()
    while child.poll() is None and not end.wait(0.1):
        pass
    end_group(child.pid, seconds)
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
