"""Fixtures for the tests of batches."""

import os
import subprocess
import sys
from functools import partial

import pytest

from tests.tools.batches import write_notebook
from tests.tools.processes import normal_signals


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook of code cells, the first of them tagged `parameters`, and return its path."""
    return partial(write_notebook, tmp_path)


@pytest.fixture
def start(home, tmp_path):
    """Start `python -m demo_lib run` in the background, with its output in the file `said`."""
    started = []

    def call(*arguments, **environment):
        command = [sys.executable, "-u", "-m", "demo_lib", "run", *map(str, arguments)]
        options = {"env": os.environ | environment, "preexec_fn": normal_signals}
        with (tmp_path / "said").open("w") as said:
            started.append(subprocess.Popen(command, stdout=said, stderr=said, **options))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def waiting(tmp_path):
    """A cell that notes that the job has begun, and waits for the file `go`, or its own."""
    return (
        "import time, pathlib\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / f'began-{number}').touch()\n"
        "while not (folder / 'go').exists() and not (folder / f'go-{number}').exists(): time.sleep(0.05)"
    )
