"""Measures of the stores: what tracking takes, what a trial takes by its study's storage, queries of many runs."""

import random
import secrets
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from demo_lib import runs
from demo_lib.config import TrainConfig, TuneConfig, sqlite_uri
from demo_lib.data import FashionData, load_data
from demo_lib.model import build_model
from demo_lib.ops.processes import free_port
from demo_lib.store import connect
from demo_lib.study import open_storage
from demo_lib.tracking import provenance, truthful_status
from demo_lib.training import fit
from demo_lib.tuning import suggest

import mlflow
import optuna
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from pydantic import SecretStr
from sqlalchemy import create_engine, insert

from server.database import database
from server.settings import ServerSettings
from server.studies import studies_address
from tests.benchmarks.rows import Row, in_turns, new_home, seconds, tracking_to
from tests.tools.processes import mlflow_server

TRACKED = TrainConfig(train_images=8_000, epochs=2, log_every=10)
TRIALS = 30
STORED_RUNS, STORED_CHILDREN, STORED_KEYS, STORED_POINTS = 10_000, 50, 10, 100
BEST = """SELECT m.run_uuid, m.value FROM latest_metrics m JOIN runs r ON r.run_uuid = m.run_uuid
    WHERE r.experiment_id = ? AND m.key = 'metric_0' ORDER BY m.value DESC LIMIT 1"""
CHILDREN = """SELECT r.*, json_group_object(m.key, m.value) FROM tags t JOIN runs r ON r.run_uuid = t.run_uuid
    JOIN latest_metrics m ON m.run_uuid = t.run_uuid WHERE t.key = ? AND t.value = ? GROUP BY t.run_uuid"""


def measure_tracking() -> Iterator[Row]:
    """Training in a run against the same training without one: its loop, whole and less what the logging calls took."""
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
        loops, without = zip(*both, strict=True)
        yield Row(store, bare, loops)
        yield Row(f"{store} calls", without, loops)


def untracked(data: FashionData) -> float:
    """Return the seconds of a training that is not tracked."""
    return seconds(list, fit(build_model(TRACKED), data, TRACKED))


def tracked(data: FashionData, address: str | None) -> tuple[float, float]:
    """Return the seconds of the training loop, and of the loop less what its logging calls took.

    The second says what tracking costs where the machine's noise hides it between two trainings.
    """
    with tracking_to(address):
        connect("tracked")
        with mlflow.start_run(tags=provenance(data, TRACKED)), truthful_status():
            mlflow.log_params(TRACKED.model_dump())
            model = build_model(TRACKED)
            calls, begun = 0.0, time.perf_counter()
            for record in fit(model, data, TRACKED):
                calls += seconds(mlflow.log_metrics, record.metrics, record.step)
            loop = time.perf_counter() - begun
        return loop, loop - calls


def measure_trial() -> Iterator[Row]:
    """What a nested run and the study's storage add to a bare trial of Optuna in memory."""
    with new_home() as home, studies_database(home / "server") as address:
        connect("trials")
        files = {"SQLite": sqlite_uri(home / "optuna.db"), "PostgreSQL": address}
        storages = {"memory": None} | {name: open_storage(each) for name, each in files.items()}
        for storage in storages.values():
            study_in_runs(storage)
        measures = [lambda storage=storage: seconds(study_in_runs, storage) for storage in storages.values()]
        bare, *nested = in_turns(lambda: seconds(bare_study), *measures)
        for storage in storages.values():
            if storage is not None:
                storage.engine.dispose()
    for name, each in zip(storages, nested, strict=True):
        yield Row(f"trial {name}", *([1000 * each / TRIALS for each in repeats] for repeats in (bare, each)))


@contextmanager
def studies_database(folder: Path) -> Iterator[str]:
    """Run the PostgreSQL of `python -m server start --studies`, and give the address that workers use."""
    drawn = {f"{name}": SecretStr(secrets.token_hex(16)) for name in ("admin_password", "secret_key")}
    drawn["studies_password"] = SecretStr(secrets.token_hex(16))
    settings = ServerSettings(profile="workshop", folder=folder, studies=True, studies_port=free_port(), **drawn)
    with database(settings):
        yield studies_address(settings)


def bare_study(objective: Callable[[optuna.Trial], float] | None = None, storage: object = None) -> None:
    """Run the trials of a study, by default in memory and with an objective that returns at once."""
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True)
    study = optuna.create_study(storage=storage, direction="maximize", sampler=sampler)
    study.optimize(objective or instant_objective, n_trials=TRIALS)


def instant_objective(trial: optuna.Trial) -> float:
    """Draw the four parameters of the lessons, and train nothing."""
    return suggest(trial, TuneConfig()).dropout


def study_in_runs(storage: object) -> None:
    """Run the same study with a parent run, and a child run with 4 parameters and 1 metric a trial."""

    def objective(trial: optuna.Trial) -> float:
        with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
            value = instant_objective(trial)
            mlflow.log_params(trial.params)
            mlflow.log_metric("val_accuracy", value)
        return value

    with mlflow.start_run():
        bare_study(objective, storage)


def measure_queries() -> Iterator[Row]:
    """`demo_lib.runs` against MLflow's own calls with their defaults, and against SQL, in a large store."""
    with new_home() as home:
        file = home / "store" / "mlflow.db"
        experiment, parent = fill_store(file)
        nested = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
        measures = {
            "best": (usual_best, (BEST, experiment), lambda: runs.best("queries", "metric_0")),
            "children": (
                lambda: mlflow.search_runs(experiment_names=["queries"], filter_string=nested),
                (CHILDREN, MLFLOW_PARENT_RUN_ID, parent),
                lambda: runs.children(parent),
            ),
        }
        for name, (usual, query, ours) in measures.items():
            calls = (usual, lambda query=query: asked(file, *query), ours)
            assert len({len(call()) for call in calls}) == 1, name  # and the first call of each is not counted
            baseline, direct, times = in_turns(*(lambda call=call: seconds(call) for call in calls))
            yield Row(name, baseline, times)
            yield Row(f"{name} SQL", direct, times)


def usual_best() -> object:
    """Read all runs and pick the best."""
    return mlflow.search_runs(experiment_names=["queries"]).nlargest(1, "metrics.metric_0")


def asked(file: Path, query: str, *values: object) -> list:
    """Return what SQLite itself answers."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(query, values).fetchall()


def fill_store(file: Path) -> tuple[int, str]:
    """Put finished runs into a new store at once; return their experiment's id, and the run id of a parent among them.

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
    engine = create_engine(sqlite_uri(file))
    with engine.begin() as connection:
        for table, values in rows.items():
            connection.execute(insert(table), values)
    engine.dispose()
    return int(experiment.experiment_id), parent
