"""Measure what this project claims about speed: `python -m tests.benchmarks.bench [--output FILE] [--only NAME ...]`.

Each measure stands beside its baseline, taken in turns with it in the same run (A B A B A B); shown are the medians.
Stores are temporary ones; only the data is this machine's. Leave the machine alone meanwhile: about 15 minutes.
"""

import argparse
import json
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from demo_lib import runs
from demo_lib.config import ROOT, TrainConfig, TuneConfig, sqlite_uri
from demo_lib.data import RAW, FashionData, Split, batches, find_data, load_data
from demo_lib.model import MEAN, STD, FashionNet, build_model
from demo_lib.ops import batch
from demo_lib.ops.jobs import plan
from demo_lib.ops.workers import tune
from demo_lib.store import connect
from demo_lib.study import open_study
from demo_lib.tracking import provenance, truthful_status
from demo_lib.training import fit, pick_device
from demo_lib.tuning import suggest

import mlflow
import optuna
import psutil
import torch
from mlflow.entities import Run
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy import create_engine, insert
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from tests.tools.processes import mlflow_server

REPEATS = 3
BATCH_IMAGES = 60_000
EPOCH_IMAGES = 12_000  # a fifth of an epoch
TRACKED = TrainConfig(train_images=12_000, epochs=2, log_every=10)
TRIALS = 50
PRUNED = TuneConfig(study="pruning", trials=12, train_images=3_000, epochs=4)
PARALLEL = TuneConfig(study="workers", trials=8, train_images=8_000, prune=False)
STORED_RUNS, STORED_CHILDREN, STORED_KEYS, STORED_POINTS = 10_000, 50, 10, 100

# How `ours` is compared with `baseline`: value, text, and whether the value reaches an aim.
COMPARISONS = {
    "faster": (lambda baseline, ours: baseline / ours, "{:.3g} x", lambda value, aim: value >= aim),
    "overhead": (lambda baseline, ours: 100 * (ours / baseline - 1), "{:+.1f}%", lambda value, aim: value <= aim),
    "difference": (lambda baseline, ours: ours - baseline, "{:+.4g}", lambda value, aim: value <= aim),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: every repeat of the baseline and of ours, and how they compare."""

    name: str
    baseline: Sequence[float]
    ours: Sequence[float]
    unit: str = "s"
    comparison: str = "faster"
    aim: float | None = None

    @property
    def ratio(self) -> float | None:
        """The comparison of the two medians, None without a baseline."""
        compare = COMPARISONS[self.comparison][0]
        return compare(statistics.median(self.baseline), statistics.median(self.ours)) if self.baseline else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached, None without one."""
        return None if self.aim is None else COMPARISONS[self.comparison][2](self.ratio, self.aim)

    def cells(self) -> list[str]:
        """Return the row as texts for the table."""
        shown = [f"{statistics.median(each):.4g} {self.unit}".strip() if each else "-" for each in self.repeats]
        text = COMPARISONS[self.comparison][1]
        ratio = "-" if self.ratio is None else text.format(self.ratio)
        aim = "" if self.aim is None else f"{text.format(self.aim)}, {'reached' if self.met else 'MISSED'}"
        return [self.name, *shown, ratio, aim]

    def to_json(self) -> dict[str, object]:
        """Return the row with its medians and all its repeats."""
        medians = [statistics.median(each) if each else None for each in self.repeats]
        values = {"name": self.name, "unit": self.unit, "baseline": medians[0], "ours": medians[1]}
        values |= {"comparison": self.comparison, "ratio": self.ratio, "aim": self.aim, "met": self.met}
        return values | {"baseline_repeats": list(self.baseline), "our_repeats": list(self.ours)}

    @property
    def repeats(self) -> tuple[Sequence[float], Sequence[float]]:
        """The repeats of the baseline and of ours."""
        return self.baseline, self.ours


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Return how long the call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def in_turns(*measures: Callable[[], object]) -> list[list]:
    """Call the measures one after the other, several times over, and return what each of them gave."""
    rounds = [[measure() for measure in measures] for _ in range(REPEATS)]
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


def usual_dataset() -> datasets.FashionMNIST:
    """Return the training images as PyTorch's tutorials read them: one by one, from a picture to a tensor."""
    steps = [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    return datasets.FashionMNIST(os.environ["DEMO_DATA_DIR"], train=True, transform=transforms.Compose(steps))


def usual_loader(dataset: Dataset) -> DataLoader:
    """Return the loader of the original demo."""
    return DataLoader(dataset, batch_size=64, shuffle=True, num_workers=0)


def measure_imports() -> Iterator[Row]:
    """The library in a new Python; the baseline loads torchvision, scikit-learn and the SQL store with it."""
    modules = [f"demo_lib.{name}" for name in ("data", "model", "training", "tracking", "tuning", "runs", "plots")]
    spared = ["torchvision", "sklearn.model_selection", "mlflow.store.tracking.sqlalchemy_store"]
    baseline, ours = in_turns(lambda: import_seconds(*spared, *modules), lambda: import_seconds(*modules))
    yield Row("import of the library", baseline, ours)


def import_seconds(*modules: str) -> float:
    """Return how long a new Python takes to import the modules."""
    code = f"import time; t = time.perf_counter(); import {', '.join(modules)}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def measure_batches() -> Iterator[Row]:
    """One pass over all images; ours leaves the normalization, two operations a batch, to the network."""
    data, dataset = load_data(TrainConfig(train_images=BATCH_IMAGES)), usual_dataset()
    parts = (data.train, data.validation)
    whole = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    def read(pairs: Iterator) -> None:
        count = sum(len(labels) for _, labels in pairs)
        assert count >= len(whole), f"only {count} images were read"

    baseline, ours = in_turns(
        lambda: seconds(read, iter(usual_loader(dataset))),
        lambda: statistics.median(  # one pass takes hundredths of a second
            seconds(read, batches(whole, 128, torch.Generator().manual_seed(0))) for _ in range(10)
        ),
    )
    yield Row(f"a pass over {len(whole):,} images", baseline, ours, aim=100)


def measure_epoch() -> Iterator[Row]:
    """An epoch, validation included, of the same network on as many images."""
    config = TrainConfig(train_images=EPOCH_IMAGES, epochs=1)
    data, dataset = load_data(config), usual_dataset()
    count = len(data.train)
    train, validation = Subset(dataset, range(count)), Subset(dataset, range(count, EPOCH_IMAGES))
    small = load_data(TrainConfig(train_images=600))
    for _ in fit(build_model(config), small, config):  # PyTorch prepares its kernels at their first use
        pass
    baseline, ours = in_turns(
        lambda: seconds(usual_epoch, build_model(config), train, validation),
        lambda: seconds(list, fit(build_model(config), data, config)),
    )
    share = EPOCH_IMAGES / 60_000
    yield Row(f"{share:.0%} of an epoch: {EPOCH_IMAGES:,} images", baseline, ours, aim=2.5)


def usual_epoch(model: FashionNet, train: Dataset, validation: Dataset) -> None:
    """Train for an epoch as PyTorch's tutorials do, in float32 with Adam, then validate."""
    device = pick_device(TrainConfig())
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, labels in usual_loader(train):
        loss = F.cross_entropy(_logits(model, images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    model.eval()
    with torch.no_grad():
        for images, labels in usual_loader(validation):
            (_logits(model, images.to(device)).argmax(dim=1).cpu() == labels).sum().item()


def _logits(model: FashionNet, images: torch.Tensor) -> torch.Tensor:
    """Apply the network to images that are normalized already."""
    return model.classifier(model.features(images))


def measure_tracking() -> Iterator[Row]:
    """Training in a run against the same training without one: the loop, and all that the `with` takes."""
    with new_home() as home, mlflow_server(home) as address:
        data = load_data(TRACKED)
        untracked(data)
        tracked(data, None)
        tracked(data, address)
        bare, local, remote = in_turns(
            lambda: untracked(data),
            lambda: tracked(data, None),
            lambda: tracked(data, address),
        )
    for store, both in {"SQLite": local, "server": remote}.items():
        loops, wholes, without = zip(*both, strict=True)
        yield Row(f"tracked training, {store}", bare, loops, comparison="overhead", aim=2)
        yield Row(f"its logging calls alone, {store}", without, loops, comparison="overhead", aim=2)
        yield Row(f"the same with opening and closing the run, {store}", bare, wholes, comparison="overhead")


def untracked(data: FashionData) -> float:
    """Return the seconds of a training that is not tracked."""
    return seconds(list, fit(build_model(TRACKED), data, TRACKED))


def tracked(data: FashionData, address: str | None) -> tuple[float, float, float]:
    """Return the seconds of the training loop, of the whole run, and of the loop less what its logging calls took.

    The last says what tracking costs where the machine's noise hides it between two trainings.
    """
    with tracking_to(address):
        connect("tracked")
        started = time.perf_counter()
        with mlflow.start_run(tags=provenance(data, TRACKED)), truthful_status():
            mlflow.log_params(TRACKED.model_dump())
            model = build_model(TRACKED)
            calls, begun = 0.0, time.perf_counter()
            for record in fit(model, data, TRACKED):
                calls += seconds(mlflow.log_metrics, record.metrics, record.step)
            loop = time.perf_counter() - begun
        return loop, time.perf_counter() - started, loop - calls


def measure_trial() -> Iterator[Row]:
    """What a nested run adds to a trial of Optuna."""
    with new_home():
        connect("trials")
        study_in_runs()
        bare, nested = in_turns(lambda: seconds(bare_study), lambda: seconds(study_in_runs))
    per_trial = ([1000 * each / TRIALS for each in repeats] for repeats in (bare, nested))
    yield Row(f"a trial of {TRIALS}, no training", *per_trial, unit="ms", comparison="difference")


def bare_study(objective: Callable[[optuna.Trial], float] | None = None) -> None:
    """Run the trials of a study in memory, by default with an objective that returns at once."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
    study.optimize(objective or instant_objective, n_trials=TRIALS)


def instant_objective(trial: optuna.Trial) -> float:
    """Draw the four parameters of the lessons, and train nothing."""
    return suggest(trial, TuneConfig()).dropout


def study_in_runs() -> None:
    """Run the same study with a parent run, and a child run with 4 parameters and 1 metric a trial."""

    def objective(trial: optuna.Trial) -> float:
        with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
            value = instant_objective(trial)
            mlflow.log_params(trial.params)
            mlflow.log_metric("val_accuracy", value)
        return value

    with mlflow.start_run():
        bare_study(objective)


def measure_pruning() -> Iterator[Row]:
    """The same study with and without pruning; the accuracy is the best trial's, on the validation split."""

    def study(prune: bool) -> tuple[float, float]:
        started = time.perf_counter()
        run = tune(PRUNED.model_copy(update={"prune": prune}), storage="memory")
        return time.perf_counter() - started, run.data.metrics["best_val_accuracy"]

    with new_home():
        results = in_turns(lambda: study(False), lambda: study(True))
    times, accuracies = zip(*(zip(*pairs, strict=True) for pairs in results), strict=True)
    yield Row(f"pruning, {PRUNED.trials} trials", *times)
    yield Row("pruning, best validation accuracy", *accuracies, unit="", comparison="difference")


def measure_workers() -> Iterator[Row]:
    """The same trials, drawn before, by one process and by two."""
    storages = iter(range(1000))

    def study(workers: int) -> Run:
        storage = sqlite_uri(home / f"optuna-{next(storages)}.db")
        config = PARALLEL.model_copy(update={"workers": workers})
        prepared = open_study(config, storage)
        for number in range(config.trials):  # the same work for both: what a sampler draws depends on the order
            prepared.enqueue_trial(
                {"learning_rate": 0.01, "batch_size": 128, "channels": 4 * (number % 4 + 1), "dropout": 0.1}
            )
        return tune(config, storage=storage)

    with new_home() as home:
        one, two = in_turns(lambda: seconds(study, 1), lambda: seconds(study, 2))
    yield Row(f"2 workers against 1, {PARALLEL.trials} trials", one, two)


def measure_queries() -> Iterator[Row]:
    """`demo_lib.runs` against MLflow's own calls with their defaults, in a large store."""
    with new_home() as home:
        parent, nested = fill_store(home / "store" / "mlflow.db")
        in_parent = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
        pairs = {
            "best run": (usual_best, lambda: runs.best("queries", "metric_0")),
            f"{len(nested)} children": (
                lambda: mlflow.search_runs(experiment_names=["queries"], filter_string=in_parent),
                lambda: runs.children(parent),
            ),
        }
        for name, (baseline, ours) in pairs.items():
            assert len(baseline()) == len(ours()), name  # and the first call of each is not counted
            times = in_turns(lambda baseline=baseline: seconds(baseline), lambda ours=ours: seconds(ours))
            yield Row(f"{name}, of {STORED_RUNS:,}", *times)


def usual_best() -> object:
    """Read all runs and pick the best."""
    return mlflow.search_runs(experiment_names=["queries"]).nlargest(1, "metrics.metric_0")


def fill_store(database: Path) -> tuple[str, list[str]]:
    """Put finished runs into a new store at once, and return the id of a parent among them and its children's ids.

    Each run has its parameters and one point a metric, the children of the parent many points.
    """
    experiment = connect("queries")
    draw = random.Random(0)
    run_ids = [uuid.UUID(int=draw.getrandbits(128)).hex for _ in range(STORED_RUNS)]
    parent, children = run_ids[0], run_ids[1 : STORED_CHILDREN + 1]
    keys, now = range(STORED_KEYS), int(time.time() * 1000)
    count = dict.fromkeys(children, STORED_POINTS)
    latest, points = [], []
    for run_id in run_ids:
        for key in keys:
            found = [
                {"run_uuid": run_id, "key": f"metric_{key}", "value": draw.random(), "timestamp": now, "step": step}
                for step in range(count.get(run_id, 1))
            ]
            points += found
            latest.append(found[-1] | {"is_nan": False})
    info = {"experiment_id": int(experiment.experiment_id), "status": "FINISHED", "user_id": "bench"}
    info |= {"start_time": now, "end_time": now}
    names = [{"run_uuid": run_id, "key": MLFLOW_RUN_NAME, "value": f"run-{run_id[:4]}"} for run_id in run_ids]
    nested = [{"run_uuid": run_id, "key": MLFLOW_PARENT_RUN_ID, "value": parent} for run_id in children]
    rows = {
        SqlRun: [
            info | {"run_uuid": each, "artifact_uri": f"{experiment.artifact_location}/{each}"} for each in run_ids
        ],
        SqlMetric: points,
        SqlLatestMetric: latest,
        SqlParam: [{"run_uuid": each, "key": f"param_{key}", "value": str(key)} for each in run_ids for key in keys],
        SqlTag: names + nested,
    }
    engine = create_engine(sqlite_uri(database))
    with engine.begin() as connection:
        for table, values in rows.items():
            connection.execute(insert(table), values)
    engine.dispose()
    return parent, children


def measure_lessons() -> Iterator[Row]:
    """Every lesson with its defaults, one at a time, once: each starts a kernel."""
    with new_home() as home:
        jobs = plan([], {}, home / "build")
        batch.run(jobs, workers=1)
    for job in jobs:
        name = f"lesson {job.name}" + ("" if job.status == "FINISHED" else f" ({job.status})")
        yield Row(name, [], [job.seconds])


PARTS = {
    "imports": measure_imports,
    "batches": measure_batches,
    "epoch": measure_epoch,
    "tracking": measure_tracking,
    "trial": measure_trial,
    "pruning": measure_pruning,
    "workers": measure_workers,
    "queries": measure_queries,
    "lessons": measure_lessons,
}


def machine() -> dict[str, object]:
    """Say on what the measures were taken; other programs' load spoils them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": named[0] if named else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(pick_device(TrainConfig())),
        "load_before": psutil.getloadavg()[0],
        "python": platform.python_version(),
    } | {package: version(package) for package in ("mlflow", "optuna", "torch", "torchvision")}


def table(lines: list[list[str]], sides: str) -> str:
    """Return lines of cells as an aligned table; `sides` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


def use_own_data(folder: Path) -> None:
    """Take this machine's data into the folder, laid as torchvision wants it, and read it there, whatever the home."""
    data = find_data()
    if data.name != "fashion-mnist":
        sys.exit("The benchmark needs the whole Fashion-MNIST: name its folder in DEMO_DATA_DIR.")
    raw = folder / RAW
    raw.mkdir(parents=True)
    for part, split in {"train": data.train, "t10k": data.test}.items():
        images, labels = split.images.numpy().tobytes(), split.labels.to(torch.uint8).numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, len(split), 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(split)) + labels)
    os.environ["DEMO_DATA_DIR"] = str(folder)


def main() -> None:
    """Measure the parts, print the table and save it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description="Measure speeds.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench.json", help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    options = parser.parse_args()
    facts, rows = machine(), []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        use_own_data(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-data-"))))
        stack.enter_context(new_home())
        for part in options.only:
            print(f"{part} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            rows += PARTS[part]()
            print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            report = {"machine": facts, "rows": [row.to_json() for row in rows]}
            options.output.write_text(json.dumps(report, indent=2), encoding="utf-8")
    lines = [["name", "baseline", "ours", "ratio", "aim"], *(row.cells() for row in rows)]
    print(table(lines, "<>>><"), "", *(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(f"\nsaved in {options.output}")


if __name__ == "__main__":
    main()
