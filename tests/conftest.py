"""Fixtures for all tests: a home of their own, a ready-made empty store, no downloads."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.tools.processes import PATIENCE

pytest.register_assert_rewrite("tests.notebooks.checks", "tests.notebooks.pages")
ROOT = Path(__file__).resolve().parent.parent
DATA_PACKAGE = Path("/usr/share/datasets/fashion-mnist")

# One thread a process: the tests run in parallel, and PyTorch's threads would fight over the cores.
os.environ |= {"DEMO_DOWNLOAD": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TQDM_DISABLE": ""}
for name in (
    "MLFLOW_TRACKING_URI",
    "DEMO_DATA_DIR",
    "DEMO_BATCH_ID",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def template(shared) -> Path:
    """A home with an empty store and the data that this machine has, made once: both take seconds to make."""
    home = shared / "template"
    with FileLock(shared / "template.lock"):
        if not (home / "ready").exists():
            code = "from demo_lib.store import connect; connect('template')"
            subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"DEMO_HOME": str(home)})
            for path in DATA_PACKAGE.glob("*.gz"):  # unpacked once and not in every process
                raw = home / "data" / "FashionMNIST" / "raw" / path.stem
                raw.parent.mkdir(parents=True, exist_ok=True)
                raw.write_bytes(gzip.decompress(path.read_bytes()))
            (home / "ready").touch()
    return home


@pytest.fixture(autouse=True)
def no_store():
    """Forget the tracking store and the login of the test before: MLflow keeps them in process and environment."""
    import mlflow

    yield
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ.pop(name, None)


@pytest.fixture
def home(template, tmp_path, monkeypatch) -> Path:
    """An own home with an empty store, and the data linked."""
    folder = tmp_path / "home"
    (folder / "store").mkdir(parents=True)
    shutil.copy(template / "store" / "mlflow.db", folder / "store" / "mlflow.db")
    (folder / "data").symlink_to(template / "data")
    monkeypatch.setenv("DEMO_HOME", str(folder))
    return folder


@pytest.fixture
def cli(home):
    """Run `python -m demo_lib` in the home, and return the finished process with its output."""

    def call(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "demo_lib", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=PATIENCE,
            cwd=home,
        )

    return call
