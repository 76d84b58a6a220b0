"""Asking the store: runs, children, the best, histories and exports, on SQLite and over HTTP."""

import math
import os
import random
import re
import shutil
import sys
import uuid

from demo_lib import runs as room
from demo_lib.config import DemoError, TrainConfig, read_yaml
from demo_lib.ops.processes import free_port
from demo_lib.runs import best, children, export, find_run, histories, runs
from demo_lib.store import connect

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun
from sqlalchemy import insert

from tests.tools.processes import serving


@pytest.fixture(scope="module")
def server(template, tmp_path_factory):
    """The address of a real `mlflow server`, one for all tests here: each would wait 7 seconds for its own."""
    database, port = tmp_path_factory.mktemp("server") / "mlflow.db", free_port()
    shutil.copy(template / "store" / "mlflow.db", database)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with serving(command, f"http://127.0.0.1:{port}/health", env=environment):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(params=["sqlite", "http"])
def store(request, home, monkeypatch):
    """A fresh experiment in each kind of store that the functions must serve."""
    if request.param == "http":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    return connect(f"asked {uuid.uuid4().hex}")


def log_run(experiment, params=None, metrics=None, tags=None, name=None, status="FINISHED"):
    """Log a finished run; a metric is a value or a list of values by step from 0. Return its id."""
    client = MlflowClient()
    run_id = client.create_run(experiment.experiment_id, run_name=name).info.run_id
    points = [
        Metric(key, value, 1_000 + step, step)
        for key, values in (metrics or {}).items()
        for step, value in enumerate(values if isinstance(values, list) else [values])
    ]
    logged = [Param(key, str(value)) for key, value in (params or {}).items()]
    client.log_batch(run_id, points[:1000], logged, [RunTag(key, value) for key, value in (tags or {}).items()])
    for start in range(1000, len(points), 1000):
        client.log_batch(run_id, points[start : start + 1000])
    if status:
        client.set_terminated(run_id, status)
    return run_id


def insert_runs(experiment, values, run_ids=None):
    """Put one run a value of the metric `score` straight into the database: thousands a second."""
    ids = run_ids or [uuid.UUID(int=random.Random(place).getrandbits(128)).hex for place in range(len(values))]
    number = int(experiment.experiment_id)
    common = {"status": "FINISHED", "lifecycle_stage": "active", "experiment_id": number}
    common |= {"user_id": "me", "artifact_uri": "nowhere"}
    rows = [{**common, "run_uuid": run, "name": run[:6], "start_time": place} for place, run in enumerate(ids)]
    metrics = [
        {"key": "score", "value": 0 if math.isnan(value) else value, "is_nan": math.isnan(value)}
        | {"run_uuid": run, "timestamp": 1, "step": 0}
        for run, value in zip(ids, values, strict=True)
    ]
    params = [{"key": "place", "value": str(place), "run_uuid": run} for place, run in enumerate(ids)]
    with MlflowClient()._tracking_client.store.ManagedSessionMaker(read_only=False) as session:
        for table, content in ((SqlRun, rows), (SqlMetric, metrics), (SqlLatestMetric, metrics), (SqlParam, params)):
            session.execute(insert(table), content)
    return ids


def one_by_one(run_ids, metrics):
    """What `histories` must equal, asked run by run with MLflow's own client."""
    points = [
        (run_id, key, point.step, point.value, point.timestamp)
        for run_id in run_ids
        for key in metrics
        for point in sorted(
            MlflowClient().get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp)
        )
    ]
    frame = pd.DataFrame(points, columns=room.HISTORY_COLUMNS)
    return frame.assign(time=pd.to_datetime(frame["time"], unit="ms", utc=True))


def assert_one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text.replace("...", "")


def test_a_run_is_found_by_id_and_by_unique_prefix_in_all_experiments(store):
    first, other = log_run(store), log_run(connect("another"))
    for run_id in (first, other):
        assert find_run(run_id).info.run_id == run_id
        assert find_run(f" {run_id[:12].upper()} ").info.run_id == run_id


def test_an_id_that_no_run_has_is_one_sentence(store):
    for run_id, words in [
        ("ab", "no run's id begins with 'ab' (at least 4 digits and letters a-f) in "),
        ("run-2", "no run's id begins with 'run-2'"),
        ("0" * 32, "no run's id begins with '000"),
    ]:
        with pytest.raises(DemoError, match=re.escape(words)) as error:
            find_run(run_id)
        assert_one_sentence(error)


def test_an_ambiguous_prefix_asks_for_more_characters(home):
    ids = [f"abcd{number}{'0' * 27}" for number in range(7)]
    insert_runs(connect("asked"), [0.0] * 7, ids)
    with pytest.raises(DemoError, match="the ids of several runs begin with 'abcd': give more characters") as error:
        find_run("abcd")
    assert_one_sentence(error)
    assert find_run("abcd3").info.run_id == ids[3]


def test_a_deleted_run_comes_with_the_command_that_restores_it(home):
    run_id = log_run(connect("asked"))
    MlflowClient().delete_run(run_id)
    with pytest.raises(DemoError, match=f"restore --run-id {run_id}"):
        find_run(run_id)


def test_runs_are_rows_with_numbers_where_a_whole_column_is_numeric(store):
    parent = log_run(store, {"lr": 0.1, "kind": "a", "mixed": 1, "empty": ""}, {"loss": [0.5, 0.25]}, name="parent")
    tags = {"mlflow.parentRunId": parent}
    child = log_run(store, {"lr": 1e-5, "kind": "2", "mixed": "x", "empty": "1", "own": 7}, tags=tags, status=None)
    frame = runs(store.name, order_by=["attributes.start_time ASC"])
    assert list(frame) == [
        *room.COLUMNS,
        *("params.empty", "params.kind", "params.lr", "params.mixed", "params.own", "metrics.loss"),
    ]
    assert list(frame["run_id"]) == [parent, child] and list(frame["status"]) == ["FINISHED", "RUNNING"]
    assert frame["params.lr"].tolist() == [0.1, 1e-5] and frame["params.mixed"].tolist() == ["1", "x"]
    assert frame["params.kind"].tolist() == ["a", "2"] and frame["params.empty"].tolist() == ["", "1"]
    assert math.isnan(frame["params.own"][0]) and frame["params.own"][1] == 7
    assert frame["metrics.loss"][0] == 0.25 and frame["name"][0] == "parent"
    info = mlflow.get_run(parent).info
    assert frame["start"][0] == pd.Timestamp(info.start_time, unit="ms", tz="UTC")
    assert frame["seconds"][0] == (info.end_time - info.start_time) / 1000 and math.isnan(frame["seconds"][1])
    assert pd.isna(frame["parent_run_id"][0]) and frame["parent_run_id"][1] == parent


def test_runs_are_filtered_ordered_and_limited(home):
    experiment = connect("asked")
    for place in range(4):
        log_run(experiment, {"place": place, "even": place % 2 == 0}, {"score": place})
    frame = runs("asked", "metrics.score > 0", ["metrics.score DESC"], limit=2)
    assert frame["params.place"].tolist() == [3, 2]
    assert runs("asked", "params.even = 'True'")["params.place"].tolist() == [2, 0]


def test_no_runs_are_an_empty_frame_with_the_columns(home):
    connect("empty")
    frame = runs("empty")
    assert list(frame) == room.COLUMNS and frame.empty and str(frame["start"].dtype).startswith("datetime64")


def test_thousands_of_runs_all_come(home, monkeypatch):
    ids = insert_runs(connect("crowd"), [0.0] * 2500)
    frame = runs("crowd")
    assert frame["run_id"].tolist() == ids[::-1] and frame["params.place"].tolist() == list(range(2499, -1, -1))
    monkeypatch.setattr(mlflow.tracking.fluent, "NUM_RUNS_PER_PAGE_PANDAS", 700)
    assert runs("crowd")["run_id"].tolist() == ids[::-1]
    assert runs("crowd", limit=1500)["run_id"].tolist() == ids[::-1][:1500]


def test_a_run_that_starts_between_two_pages_is_not_counted_twice(home, monkeypatch):
    experiment = connect("busy")
    ids = [log_run(experiment) for _ in range(4)]
    monkeypatch.setattr(mlflow.tracking.fluent, "NUM_RUNS_PER_PAGE_PANDAS", 2)
    search = MlflowClient.search_runs

    def search_then_start(*args):
        page = search(*args)
        log_run(experiment)
        return page

    monkeypatch.setattr(MlflowClient, "search_runs", search_then_start)
    found = runs("busy", limit=6)["run_id"]
    assert found.is_unique and set(ids) <= set(found)


def test_an_unknown_experiment_names_the_known_ones(home):
    connect("asked")
    with pytest.raises(DemoError, match=r"no experiment 'aksed'; it has (.*asked)") as error:
        runs("aksed")
    assert_one_sentence(error)


def test_a_filter_or_an_order_that_mlflow_cannot_read_is_its_own_error(home):
    connect("asked")
    with pytest.raises(mlflow.MlflowException, match="Invalid clause"):
        runs("asked", "metrics.loss < 1 OR metrics.loss > 2")
    with pytest.raises(mlflow.MlflowException, match="Invalid ordering key"):
        runs("asked", order_by=["metrics.loss SIDEWAYS"])
    assert runs("asked", limit=0).empty


def test_children_are_the_runs_nested_directly(store):
    parent, other = log_run(store), log_run(store)
    nested = [log_run(store, {"lr": place}, tags={"mlflow.parentRunId": parent}) for place in range(3)]
    log_run(store, tags={"mlflow.parentRunId": nested[0]})
    elsewhere = log_run(connect("elsewhere"), {"lr": 3}, tags={"mlflow.parentRunId": parent})
    frame = children(parent[:12], order_by=["params.lr ASC"])
    assert frame["run_id"].tolist() == [*nested, elsewhere] and set(frame["parent_run_id"]) == {parent}
    assert children(parent, "params.lr = '1'")["run_id"].tolist() == [nested[1]]
    assert children(other).empty
    with pytest.raises(DemoError, match="no run's id begins"):
        children("0" * 32)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_are_exact_and_only_a_few_are_fetched(home, monkeypatch, mode):
    rng = random.Random(0)
    values = [rng.choice([rng.gauss(0, 1), 10 ** rng.uniform(-9, 25), -1e-7, 0.5, math.nan]) for _ in range(3000)]
    ids = insert_runs(connect("crowd"), values)
    places = sorted(
        (place for place in range(3000) if not math.isnan(values[place])),
        key=lambda place: (-values[place] if mode == "max" else values[place], -place),
    )
    fetched = []
    search = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *args: (page := search(*args), fetched.append(len(page)))[0]
    )
    for n in (1, 10, 150):
        fetched.clear()
        assert best("crowd", "score", mode, n=n)["run_id"].tolist() == [ids[place] for place in places[:n]]
        assert fetched == [n]


def test_best_takes_a_filter_and_leaves_out_runs_without_a_value(store):
    for place, value in enumerate([0.1, 0.9, math.inf, math.nan, 0.5]):
        log_run(store, {"place": place, "kind": "ab"[place % 2]}, {"val/accuracy 1": value})
    log_run(store, {"place": 5, "kind": "a"})
    assert best(store.name, "val/accuracy 1")["params.place"].tolist() == [2]
    assert best(store.name, "val/accuracy 1", "min", n=10)["params.place"].tolist() == [0, 4, 1, 2]
    assert best(store.name, "val/accuracy 1", where="params.kind = 'b'", n=2)["params.place"].tolist() == [1]


def test_best_refuses_what_it_does_not_know(store):
    log_run(store, {"kind": "a"}, {"val_loss": 1.0})
    for metric, where in (("los", ""), ("val_loss", "params.kind = 'b'")):
        with pytest.raises(DemoError, match=f"no run of {store.name!r} that was asked for has the metric {metric!r}"):
            best(store.name, metric, where=where)
    with pytest.raises(DemoError, match="no experiment 'akse'"):
        best("akse", "loss")


def test_histories_equal_those_asked_run_by_run(store):
    long = [math.sin(step) for step in range(1300)]
    run_ids = [log_run(store, metrics={"loss": long, "score": [1.0, math.nan, math.inf]}) for _ in range(3)]
    run_ids.append(log_run(store, metrics={"score": 4.0}))
    MlflowClient().log_metric(run_ids[1], "loss", -1.0, timestamp=5_000, step=7)  # a step logged twice, out of order
    asked = [run_ids[2], run_ids[3], run_ids[0], run_ids[1]]
    frame = histories(asked, ["score", "loss"])
    pd.testing.assert_frame_equal(frame, one_by_one(asked, ["score", "loss"]), check_dtype=False)
    assert len(frame) == 3 * 1303 + 2 and list(dict.fromkeys(frame["run_id"])) == asked
    assert str(frame["step"].dtype) == "int64" and str(frame["time"].dtype).endswith("UTC]")
    assert histories(run_ids[3:], ["loss"]).empty and list(histories([], ["loss"])) == room.HISTORY_COLUMNS


def test_histories_of_an_unknown_run_are_refused(store):
    run_id = log_run(store, metrics={"loss": 1.0})
    wrong = run_id[:-1] + ("0" if run_id[-1] != "0" else "1")
    with pytest.raises(DemoError, match=f"no run's id begins with '{wrong}'"):
        histories([run_id, wrong], ["loss"])


def test_a_configuration_comes_back_from_its_export(store, tmp_path):
    config = TrainConfig(epochs=3, learning_rate=0.0125, flip=True, device="cpu")
    run_id = log_run(store, config.model_dump() | {"extra": 1})
    export(run_id[:12], tmp_path / "config.yaml")
    assert TrainConfig(**read_yaml(tmp_path / "config.yaml")) == config
    params = find_run(run_id).data.params
    assert params == {name: str(value) for name, value in config.model_dump().items()} | {"extra": "1"}
    assert TrainConfig.from_params(params) == config


def test_a_run_without_a_whole_configuration_is_refused(home, tmp_path):
    experiment = connect("asked")
    for params in ({}, {"learning_rate": 0.1, "epochs": 2}):
        with pytest.raises(DemoError, match=r"logged no train_images, .*choose a run") as error:
            export(log_run(experiment, params), tmp_path / "config.yaml")
        assert_one_sentence(error)
    assert not list(tmp_path.glob("*.yaml"))


def test_metrics_come_back_from_their_export(store, tmp_path):
    run_id = log_run(store, metrics={"loss": [0.1 + step / 3 for step in range(1100)], "acc": [0.5, math.nan]})
    expected = one_by_one([run_id], ["acc", "loss"])
    export(run_id[:12], tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), expected, check_dtype=False)
    export(run_id, tmp_path / "a.CSV")
    back = pd.read_csv(tmp_path / "a.CSV", parse_dates=["time"])
    pd.testing.assert_frame_equal(back, expected, check_dtype=False)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a.parquet", "a.CSV"}


def test_exports_that_cannot_be_written_leave_nothing(home, tmp_path, monkeypatch):
    run_id = log_run(connect("asked"), TrainConfig().model_dump(), {"loss": 1.0})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "taken.csv").mkdir()
    for path in (folder / "missing" / "a.csv", folder / "taken.csv"):
        with pytest.raises(DemoError, match=r"can't be written \(.*name a file in a folder that can be") as error:
            export(run_id, path)
        assert_one_sentence(error)
    with pytest.raises(DemoError, match=r"a.txt must end in \.csv or \.parquet or"):
        export(run_id, folder / "a.txt")

    def full(path, content):
        open(path, "wb").write(content[:5])  # noqa: PTH123, SIM115
        raise OSError(28, "No space left on device")

    (folder / "config.yaml").write_text("before")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DemoError, match="No space left on device"):
        export(run_id, folder / "config.yaml")
    assert (folder / "config.yaml").read_text() == "before"
    assert {path.name for path in folder.iterdir()} == {"taken.csv", "config.yaml"}


def test_the_view_of_deleted_runs_is_not_mixed_in(home):
    experiment = connect("asked")
    kept, gone = log_run(experiment, metrics={"loss": 1.0}), log_run(experiment, metrics={"loss": 0.5})
    MlflowClient().delete_run(gone)
    assert runs("asked")["run_id"].tolist() == [kept] == best("asked", "loss", "min", n=5)["run_id"].tolist()
    assert len(MlflowClient().search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 2
