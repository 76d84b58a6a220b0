"""A Dask cluster of processes for the tests, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

from demo_lib.config import ROOT

from tests.tools.processes import normal_signals, wait_until


def named(host: str, folder: Path) -> dict[str, str]:
    """Return variables with which a process believes that its machine has this name; the folder is made for it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {host!r}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


class DaskCluster:
    """A scheduler and workers, each with one thread, which tests may kill; their output is in files of the folder."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.workers, self.began = folder, [], []
        ports = ["--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", *ports, **variables)
        wait_until(lambda: self._said("scheduler", "Scheduler at:"))
        line = self._said("scheduler", "Scheduler at:")
        self.address = line.rpartition(" ")[2]

    def add_worker(self, **variables: str) -> subprocess.Popen:
        """Start a worker with these environment variables, and wait until the scheduler knows it."""
        name = f"worker{len(self.workers)}"
        options = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        self.workers.append(self._start("worker", self.address, *options, name=name, **variables))
        wait_until(lambda: self._said(name, "Registered to:"))
        return self.workers[-1]

    def close(self) -> None:
        """Kill them all."""
        for process in self.began:
            process.kill()
            process.wait()

    def _start(self, what: str, *arguments: str, name: str = "", **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
        with (self.folder / (name or what)).open("w") as log:
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
            options = {"cwd": self.folder, "env": environment, "preexec_fn": normal_signals}
            self.began.append(subprocess.Popen(command, stdout=log, stderr=log, **options))
        return self.began[-1]

    def _said(self, name: str, words: str) -> str:
        lines = (self.folder / name).read_text().splitlines()
        return next((line.strip() for line in lines if words in line), "")
