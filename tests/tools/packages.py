"""What tests need from the system: missing, it is a visible skip, and a failure in CI."""

import os
import shutil
from typing import NoReturn

import pytest


def find_program(package: str, *names: str) -> str:
    """Return the path of the first program of these names that is here, or else skip the test, in CI fail it."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    return found or missing(package)


def missing(package: str) -> NoReturn:
    """Skip the test, or fail it in CI, with the name of the package to install."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not here: install the package {package}")
