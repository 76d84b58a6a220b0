"""The whole stack imports and fits together; a `+cpu` torch with another index's torchvision does not."""

import ast
import re
import subprocess
import sys
from importlib import import_module

from demo_lib.config import ROOT, lessons

import nbformat
import pytest

STACK = ["torch", "torchvision", "mlflow.pytorch", "optuna", "matplotlib.pyplot", "jupyterlab", "papermill", "nbval"]


@pytest.mark.parametrize("name", STACK)
def test_import(name):
    import_module(name)


def test_torchvision_has_its_operators():
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]


# Each room imports only rooms that stand before it.
CORE = "config identity databases data model parallel training store tracking study tuning runs plots recipe"
CORE = [f"demo_lib.{name}" for name in CORE.split()]
SHARED = ["demo_lib.ops.guard", "demo_lib.ops.processes"]
DEPLOY = [f"demo_lib.deploy.{name}" for name in ("packaging", "classifier", "registry", "serving")]
EXERCISES = ["evidence", "judging", "words", "quiz", *(f"lesson_{number:02}" for number in (*range(9), 10))]
EXERCISES = [f"demo_lib.exercises.{name}" for name in [*EXERCISES, "faults", "hunts", "capstone"]]
OPS = "cluster workers kernel jobs execution records remote batch reproduce originals copying push doctor"
OPS = [f"demo_lib.ops.{name}" for name in OPS.split()]
SERVER = "settings studies database client process background readiness participants progress backup cleanup __main__"
SERVER = [f"server.{name}" for name in SERVER.split()]
MAIN = ["demo_lib.__main__"]
# For speed: PyTorch and MLflow take seconds to load, and some who use these rooms need neither.
LATE = {
    "demo_lib.store",
    "demo_lib.tracking",
    "demo_lib.ops.execution",
    "demo_lib.ops.records",
    "demo_lib.ops.remote",
    "demo_lib.ops.batch",
    "demo_lib.ops.doctor",
    "demo_lib.__main__",
    "server.__main__",
}


def may_import(room):
    """Return the rooms that this one may import."""
    if room in SERVER:
        judges = ["demo_lib.exercises", *EXERCISES] if room == "server.progress" else []
        return [*CORE[:3], *SHARED, *judges, *SERVER[: SERVER.index(room)]]
    if room in MAIN:
        return [*CORE, *SHARED, *DEPLOY, *OPS, "demo_lib.exercises"]
    if room in SHARED:
        return ["demo_lib.config", *SHARED[: SHARED.index(room)]]
    wing = next(wing for wing in (CORE, DEPLOY, EXERCISES, OPS) if room in wing)
    return [*([] if wing is CORE else CORE + SHARED), *wing[: wing.index(room)]]


def imports(room):
    """Return what the room imports of this project, and whether that is done late."""
    tree = ast.parse(path_of(room).read_text("utf-8"))
    at_once = {id(node) for node in tree.body} | {
        id(each) for node in tree.body if isinstance(node, ast.If) for each in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("demo_lib", "server"):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in whole if name in ROOMS]
            yield from ((name, id(node) not in at_once) for name in known or [node.module])


def path_of(room):
    return ROOT.joinpath(*room.split(".")).with_suffix(".py")


ROOMS = [*CORE, *SHARED, *DEPLOY, *EXERCISES, *OPS, *SERVER, *MAIN]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    found = list(imports(room))
    assert {name for name, _ in found} <= set(may_import(room))
    assert room in LATE or not [name for name, late in found if late]


def test_the_network_knows_no_mlflow():
    for room in ("demo_lib.data", "demo_lib.model", "demo_lib.parallel", "demo_lib.training"):
        assert "mlflow" not in re.findall(r"^ *(?:import|from) (\w+)", path_of(room).read_text("utf-8"), re.M)


def test_every_module_is_in_the_list():
    files = [path for top in ("demo_lib", "server") for path in (ROOT / top).rglob("[a-z_]*.py")]
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.name != "__init__.py"}
    assert found == set(ROOMS)


def test_the_core_is_small():
    lines = {room: len(path_of(room).read_text("utf-8").splitlines()) for room in CORE}
    assert max(lines.values()) <= 220, lines


# What each module may load; nothing comes along that these don't load themselves.
CONFIG = {"pydantic_settings", "yaml"}
DATABASES = CONFIG | {"alembic", "filelock", "sqlalchemy"}
NETWORK = CONFIG | {"joblib", "torch"}
STORE = CONFIG | {"filelock", "mlflow", "psutil", "requests"}
TRACKING = STORE | {"git"}
TABLES = STORE | {"pandas"}
TUNING = NETWORK | DATABASES | TRACKING | {"optuna", "tqdm"}
MAY_LOAD = {
    "config": CONFIG,
    "identity": {"psutil"} | CONFIG,
    "databases": DATABASES,
    "data": NETWORK,
    "model": NETWORK,
    "parallel": CONFIG | {"psutil", "torch"},
    "training": NETWORK | {"psutil"},
    "store": STORE,
    "tracking": TRACKING,
    "study": TUNING - {"joblib", "torch"},
    "tuning": TUNING,
    "runs": TABLES,
    "plots": CONFIG | {"matplotlib.pyplot", "pandas"},
    "recipe": NETWORK | TRACKING | {"tqdm"},
    "ops.guard": {"psutil"},
    "ops.processes": CONFIG | {"requests"},
    "ops.cluster": CONFIG | {"requests"},
    "ops.workers": TUNING,
    "ops.jobs": CONFIG | {"papermill"},
    "ops.execution": CONFIG | {"joblib", "papermill"},
    "ops.records": CONFIG | {"joblib", "papermill"},
    "ops.remote": CONFIG | {"joblib", "papermill", "requests"},
    "ops.batch": CONFIG | {"filelock", "joblib", "papermill", "psutil", "requests"},
    "ops.reproduce": NETWORK | TRACKING | TABLES | {"tqdm"},
    "ops.push": TABLES | {"yaml"},
    "ops.doctor": CONFIG | {"requests"},
    "exercises": TABLES | {"sqlalchemy"},
    "deploy.packaging": NETWORK | TABLES,
    "deploy.registry": NETWORK | TRACKING | TABLES | {"tqdm"},
    "deploy.serving": NETWORK | TABLES,
}


@pytest.mark.parametrize("module", MAY_LOAD)
def test_a_module_loads_no_more_than_it_may(module):
    code = f"""
import demo_lib, sys, {", ".join(MAY_LOAD[module])}
before = {{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names
import demo_lib.{module}
print(*{{name.partition(".")[0] for name in sys.modules}} - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# What a lesson's first cell loads only if the lesson uses it: it names it, or a module that does.
SPARED = {"matplotlib", "optuna", "papermill", "scipy.stats", "sklearn", "sqlalchemy", "torch._dynamo", "torchvision"}
USED = {"demo_lib.plots": {"matplotlib"}, "demo_lib.tuning": {"optuna", "sqlalchemy"}, "sklearn": {"scipy.stats"}}
USED["demo_lib.exercises"] = USED["server"] = {"sqlalchemy"}
USED |= {"demo_lib.ops.batch": {"papermill"}, "demo_lib.ops.workers": USED["demo_lib.tuning"]}


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_lesson_loads_no_library_that_it_does_not_use(lesson):
    cells = [cell.source for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == "code"]
    code = next(cell for cell in cells if "import demo_lib" in cell or "from demo_lib" in cell)
    code = "\n".join(line for line in code.splitlines() if not line.startswith("%"))
    names = re.findall(r"^(?:from|import) ([\w.]+)", code, re.M)
    parts = {".".join(name.split(".")[:length]) for name in names for length in (1, 2, 3)}
    used = parts.union(*(USED.get(part, set()) for part in parts))
    code += f"\nimport sys; print(*{SPARED - used!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=lesson.parent)
    assert done.stdout.split() == []


def test_loading_the_data_does_not_load_torchvision(home):
    code = "from demo_lib.data import load_data; load_data(); import sys; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_watches_over_the_server_starts_without_pytorch_and_mlflow():
    code = "import server.process, sys; assert not {'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_lib_keeps_mlflow_quiet_unless_told_otherwise():
    code = (
        "import demo_lib, mlflow, logging; from mlflow.telemetry.client import get_telemetry_client as c;"
        "print(c(), logging.getLogger('mlflow').level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "30"]
    assert not done.stderr
