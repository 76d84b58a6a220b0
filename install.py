"""Install the lessons into .venv: `python3 install.py`, with `--dev` what the tests need too. `make setup` calls it.

PyTorch comes as the build for this machine: on Linux without a GPU's driver that saves 3 GB of CUDA libraries. These
builds are in PyTorch's own package index; where it can't be reached, PyTorch comes from your usual index, PyPI or
another. `UV_TORCH_BACKEND`, when set, decides instead (https://docs.astral.sh/uv/guides/integration/pytorch).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 14)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN, SUFFIX = (VENV / "Scripts", ".exe") if os.name == "nt" else (VENV / "bin", "")
PYTHON, UV = BIN / f"python{SUFFIX}", BIN / f"uv{SUFFIX}"
PINS = ["--python", PYTHON, "--constraints", ROOT / "constraints.txt"]
# Without what would lead pip and Python elsewhere than into .venv.
ELSEWHERE = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PYTHONHOME"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
ONE_TRY = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5"}  # seconds


def main() -> None:
    """Make the environment, install, and leave the files by which make knows that it is done."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(f"Python {sys.version.split()[0]} doesn't do: use 3.11 to 3.14, as in `make setup PYTHON=python3.12`.")
    parser = argparse.ArgumentParser(description="Install the lessons into .venv.")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    dev = parser.parse_args().dev
    try:
        if not is_usable():
            run(sys.executable, "-m", "venv", "--clear", VENV)
            run(PYTHON, "-m", "pip", "install", "--quiet", "uv")
        project = f"{ROOT}[{'dev' if dev else 'dask'}]"
        run(UV, "pip", "install", "--compile-bytecode", *PINS, *torch_backend(), "--editable", project)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the command has said why
    except KeyboardInterrupt:
        sys.exit(130)
    (VENV / (".installed-dev" if dev else ".installed")).touch()


def is_usable() -> bool:
    """Whether .venv is an environment of this Python's version with a uv that runs: an interrupted one is made anew."""
    checks = f"import sys; sys.exit(sys.prefix == sys.base_prefix or sys.version_info[:2] != {sys.version_info[:2]})"
    try:
        return not any(
            subprocess.run(command, capture_output=True, env=ENVIRONMENT).returncode
            for command in ([PYTHON, "-c", checks], [UV, "--version"])
        )
    except OSError:
        return False


def torch_backend() -> list[str]:
    """Return uv's option for the build that fits this machine, nothing where PyTorch's index doesn't have the pins."""
    if os.environ.get("UV_TORCH_BACKEND"):
        return []
    choice = ["--torch-backend", "auto"]
    tried = subprocess.run(
        [UV, "pip", "compile", "--quiet", *PINS, *choice, "-"],
        input="torch\ntorchvision\n",
        text=True,
        capture_output=True,
        env={**ENVIRONMENT, **ONE_TRY},
    )
    if tried.returncode == 0:
        return choice
    print(
        "PyTorch's own package index (download.pytorch.org) can't be used here: taking PyTorch from your usual index, "
        "on Linux with 3 GB of libraries for GPUs."
    )
    return []


def run(*command: str | Path) -> None:
    """Run the command in the repository, so that its output is seen."""
    subprocess.run(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, check=True)


if __name__ == "__main__":
    main()
