"""The rows of the benchmark's table, each with its limit; how they are measured: in turns, in homes of their own."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from demo_lib.config import TrainConfig, lessons
from demo_lib.training import pick_device

import mlflow
import psutil
import torch

REPEATS = 3
MOST = 60  # seconds that a lesson may take

# How `ours` is compared with `baseline`: value, text, sign of the limit, and whether the value keeps it.
COMPARISONS = {
    "faster": (lambda baseline, ours: baseline / ours, "{:.3g} x as fast", "≥", lambda value, aim: value >= aim),
    "longer": (lambda baseline, ours: ours / baseline, "{:.3g} x as long", "≤", lambda value, aim: value <= aim),
    "overhead": (lambda baseline, ours: 100 * (ours / baseline - 1), "{:+.1f} %", "≤", lambda value, aim: value <= aim),
    "more": (lambda baseline, ours: ours - baseline, "{:+.3g}", "≤", lambda value, aim: value <= aim),
    "at most": (lambda baseline, ours: ours, "{:.3g}", "≤", lambda value, aim: value <= aim),
    "at least": (lambda baseline, ours: ours, "{:.3g}", "≥", lambda value, aim: value >= aim),
}


@dataclass(frozen=True)
class Kind:
    """What a row measures and beside what, if beside anything, how the two are compared, the limit, and the unit."""

    name: str
    beside: str
    comparison: str
    aim: float
    unit: str = "s"


IMAGES, QUERY, CHILDREN = "a pass over 60,000 images", "the best of 10,000 runs", "50 children among 10,000 runs"
SQLITE, SERVER = "training tracked in SQLite", "training tracked in a server"
TRIAL, BARE = "a trial as a nested run, nothing trained", "Optuna alone, in memory"
TRIALS, ALONE = "8 trials", "one process"
ROWS = {
    "imports": Kind("import of demo_lib", "with torchvision, scikit-learn, MLflow's SQL store", "faster", 1.2),
    "batches": Kind(IMAGES, "torchvision's dataset in a DataLoader", "faster", 100),
    "copy": Kind(IMAGES, "one copy of them as float32", "longer", 3),
    "epoch": Kind("a fifth of an epoch", "the loop of PyTorch's tutorials", "faster", 2.5),
    "quick": Kind("training for 91.6%: 2 epochs", "", "at most", 60),
    "quick accuracy": Kind("test accuracy after these 2 epochs", "", "at least", 91.6, "%"),
    "full": Kind("training for 93%: full.yaml", "", "at most", 180),
    "full accuracy": Kind("test accuracy after full.yaml", "", "at least", 93, "%"),
    "SQLite": Kind(SQLITE, "untracked", "overhead", 2),
    "SQLite calls": Kind(SQLITE, "the same less its logging calls", "overhead", 2),
    "server": Kind(SERVER, "untracked", "overhead", 2),
    "server calls": Kind(SERVER, "the same less its logging calls", "overhead", 2),
    "trial memory": Kind(f"{TRIAL}; study in memory", BARE, "more", 100, "ms"),
    "trial SQLite": Kind(f"{TRIAL}; study in SQLite", BARE, "more", 200, "ms"),
    "trial PostgreSQL": Kind(f"{TRIAL}; study in PostgreSQL", BARE, "more", 200, "ms"),
    "pruning": Kind("12 trials, pruned", "the same, each to its end", "faster", 1.2),
    # Within the standard error of 166 validation images they are as good.
    "pruning accuracy": Kind("best validation accuracy, each to its end", "pruned", "more", 2, "%"),
    "2 threads": Kind(f"{TRIALS} by 2 threads", ALONE, "faster", 0.8),
    "2 workers": Kind(f"{TRIALS} by 2 workers", ALONE, "faster", 0.9),
    "4 workers": Kind(f"{TRIALS} by 4 workers", ALONE, "faster", 0.7),
    "Dask": Kind(f"{TRIALS} by 2 workers of a Dask cluster here", ALONE, "faster", 0.8),
    "best": Kind(QUERY, "mlflow.search_runs", "faster", 10),
    "best SQL": Kind(QUERY, "the database asked directly", "longer", 10),
    "children": Kind(CHILDREN, "mlflow.search_runs", "longer", 4),
    "children SQL": Kind(CHILDREN, "the database asked directly", "longer", 100),
    **{
        key: each
        for name in (path.stem for path in lessons())
        for key, each in {
            f"{name} cold": Kind(f"{name}, new store", "", "at most", MOST),
            f"{name} warm": Kind(f"{name}, again", "new store", "longer", 1.1),
            f"{name} imports": Kind(f"{name}, imports again", "imports at first", "at most", 6),
        }.items()
    },
    "jobs": Kind("all lessons in a new store, 2 jobs", "1 job", "faster", 1.1),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: every repeat of the baseline and of ours, and how they compare."""

    key: str
    baseline: Sequence[float]
    ours: Sequence[float]

    @property
    def kind(self) -> Kind:
        """What the row measures."""
        return ROWS[self.key]

    @property
    def ratio(self) -> float:
        """The comparison of the two medians."""
        return COMPARISONS[self.kind.comparison][0](*self.medians)

    @property
    def met(self) -> bool:
        """Whether the limit is kept."""
        return COMPARISONS[self.kind.comparison][3](self.ratio, self.kind.aim)

    @property
    def medians(self) -> list[float | None]:
        """The medians of the baseline, None without one, and of ours."""
        return [statistics.median(each) if each else None for each in (self.baseline, self.ours)]

    def to_json(self) -> dict[str, object]:
        """Return the row with its medians and all its repeats."""
        kind, (baseline, ours) = self.kind, self.medians
        values = {"key": self.key, "name": kind.name, "beside": kind.beside, "unit": kind.unit}
        values |= {
            "baseline": baseline,
            "ours": ours,
            "comparison": kind.comparison,
            "ratio": self.ratio,
            "aim": kind.aim,
            "met": self.met,
        }
        return values | {"baseline_repeats": list(self.baseline), "our_repeats": list(self.ours)}


HEADER = ["measured", "beside", "baseline", "ours", "ratio", "limit"]


def cells(row: dict) -> list[str]:
    """Return a row of a report as texts for a table."""
    unit, (_, text, sign, _) = row["unit"], COMPARISONS[row["comparison"]]
    shown = ["" if each is None else f"{each:.3g} {unit}" for each in (row["baseline"], row["ours"])]
    ratio = "" if row["comparison"].startswith("at") else text.format(row["ratio"])
    of = {"faster": "x", "longer": "x", "overhead": "%"}.get(row["comparison"], unit)
    limit = f"{sign} {row['aim']:g} {of}, {'kept' if row['met'] else 'MISSED'}"
    return [row["name"], row["beside"], *shown, ratio, limit]


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Return how long the call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def in_turns(*measures: Callable[[], object], repeats: int = REPEATS) -> list[list]:
    """Call the measures one after the other, several times over, and return what each of them gave."""
    rounds = [[measure() for measure in measures] for _ in range(repeats)]
    return [list(results) for results in zip(*rounds, strict=True)]


@contextmanager
def new_home() -> Iterator[Path]:
    """Set an empty home with a store of its own until the block ends; MLflow keeps the store that it used last."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        with tracking_to(None):
            os.environ["DEMO_HOME"] = str(home)
            yield home


@contextmanager
def tracking_to(address: str | None) -> Iterator[None]:
    """Track to the address, or to the home's own store, until the block ends."""
    before = dict(os.environ)
    mlflow.set_tracking_uri(address)  # sets the environment's variable too
    if address is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before.get("MLFLOW_TRACKING_URI"))
        os.environ.clear()
        os.environ |= before


def machine() -> dict[str, object]:
    """Say on what the measures were taken; other programs' load spoils them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": named[0] if named else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(),
        "bfloat16": bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
        "torch_threads": torch.get_num_threads(),
        "device": str(pick_device(TrainConfig())),
        "load_before": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
    } | {package: version(package) for package in ("mlflow", "optuna", "torch", "torchvision", "distributed")}


def table(lines: list[list[str]], sides: str) -> str:
    """Return lines of cells as an aligned table; `sides` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
