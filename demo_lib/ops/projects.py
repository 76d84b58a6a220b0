"""The project as MLflow runs it from elsewhere: a git address without a network, and what child processes print."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from demo_lib.config import ROOT, DemoError


def publish(folder: Path) -> tuple[str, str]:
    """Make a bare clone of this repository's last commit in the folder, and return its address and the commit.

    Where the project is no git repository, its files are committed there as they are.

    Raises:
        DemoError: git is not installed, or refuses.
    """
    bare = folder / "project.git"
    if (ROOT / ".git").exists():
        _git("clone", "--quiet", "--bare", ROOT, bare)
    else:
        print("This project is no git repository: its files, as they are, become the first commit of one.")
        _git("init", "--quiet", "--bare", bare)
        there = (f"--git-dir={bare}", f"--work-tree={ROOT}", "-c", "user.name=demo", "-c", "user.email=demo@localhost")
        _git(*there, "add", "--all")
        _git(*there, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message=The project as it was found")
    # MLflow would take a path that exists for a plain folder; without its `.git`, only git finds it.
    return bare.with_suffix("").as_uri(), _git(f"--git-dir={bare}", "rev-parse", "HEAD")


@contextmanager
def live_output() -> Iterator[None]:
    """Print what child processes write, errors too, line by line as it comes, as a terminal does by itself.

    The block ends when the last child has closed its output.
    """
    if sys.stdout is sys.__stdout__:
        yield
        return
    end, start = os.pipe()
    before = {number: os.dup(number) for number in (1, 2)}  # children write to these numbers, not to sys.stdout
    for number in before:
        os.dup2(start, number)
    os.close(start)

    def print_lines() -> None:
        with os.fdopen(end, errors="replace") as lines:
            for line in lines:
                print(line, end="")

    printer = Thread(target=print_lines)
    printer.start()
    try:
        yield
    finally:
        for number, kept in before.items():
            os.dup2(kept, number)
            os.close(kept)
        printer.join()


def _git(*arguments: str | Path) -> str:
    try:
        done = subprocess.run(["git", *map(str, arguments)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise DemoError("git is not installed: install it and restart the kernel.") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or error.stdout.strip() or f"exit code {error.returncode}"
        raise DemoError(f"git refuses ({said}): do what it says.") from None
    return done.stdout.strip()
