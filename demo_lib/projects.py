"""The project as MLflow runs it from elsewhere: a git address without a network, and the errors that a child prints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo_lib.config import ROOT, DemoError


class ProjectError(DemoError):
    """The project can't be made into a git repository."""


def publish(folder: Path) -> tuple[str, str]:
    """Make a bare clone of this repository's last commit in the folder, and return its address and the commit.

    Where the project is no git repository, its files are committed there as they are. The address leaves out `.git`,
    which git finds by itself: MLflow would take a path that exists for a plain folder.

    Raises:
        ProjectError: git is not installed, or refuses.
    """
    bare = folder / "project.git"
    if (ROOT / ".git").exists():
        _git("clone", "--quiet", "--bare", ROOT, bare)
    else:
        print("This project is no git repository: its files, as they are, become the first commit of one.")
        _git("init", "--quiet", "--bare", bare)
        there = (f"--git-dir={bare}", f"--work-tree={ROOT}", "-c", "user.name=demo", "-c", "user.email=demo@localhost")
        _git(*there, "add", "--all")
        _git(*there, "commit", "--quiet", "--message=The project as it was found")
    return bare.with_suffix("").as_uri(), _git(f"--git-dir={bare}", "rev-parse", "HEAD")


@contextmanager
def errors_as_output() -> Iterator[None]:
    """Send what child processes write to standard error to standard output: a notebook shows it there, not in red."""
    before = os.dup(2)
    os.dup2(1, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _git(*arguments: str | Path) -> str:
    try:
        done = subprocess.run(["git", *map(str, arguments)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ProjectError("git is not installed: install it and restart the kernel.") from None
    except subprocess.CalledProcessError as error:
        raise ProjectError(f"git refuses ({error.stderr.strip()}): do what it says.") from None
    return done.stdout.strip()
