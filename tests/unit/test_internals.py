"""Each part of MLflow that it does not promise to keep still does what the store needs it for."""

from demo_lib import store
from demo_lib.databases import make_store
from demo_lib.exercises import evidence
from demo_lib.store import own_name

import mlflow
import pytest
import sqlalchemy
from mlflow.entities import Metric

from tests.tools.processes import mlflow_server


def test_the_login_is_found_where_mlflow_looks_for_it(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    assert store.get_default_host_creds("https://example.org").username == "ann" and own_name("x") == "ann/x"


def test_one_request_is_sent_and_not_again(tmp_path):
    once = {"max_retries": 0, "timeout": 9, "raise_on_status": False, "json": {"max_results": 1}}
    with mlflow_server(tmp_path) as uri:
        creds = store.get_default_host_creds(uri)
        answer = store.http_request(creds, "/api/2.0/mlflow/experiments/search", "POST", **once)
    assert answer.json()["experiments"][0]["name"] == "Default"
    with pytest.raises(mlflow.MlflowException):
        store.http_request(creds, "/version", "GET", **once)


def test_a_new_store_has_mlflows_tables_and_no_open_connection(tmp_path):
    make_store(tmp_path / "new.db")
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/new.db")
    names = sqlalchemy.inspect(engine).get_table_names()
    (index,) = [each for each in names if each == "latest_metrics"]
    with engine.connect() as connection:  # `databases.make_store` tells SQLite how large this one is
        found = connection.scalar(sqlalchemy.text(f"SELECT name FROM pragma_index_list('{index}') WHERE origin = 'pk'"))
    engine.dispose()
    assert found == "sqlite_autoindex_latest_metrics_1"


def test_histories_are_read_at_once_or_not_at_all_and_files_by_their_address(tmp_path, monkeypatch):
    with mlflow_server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        client, ids = mlflow.MlflowClient(), []
        for values in ([0.5, float("nan"), float("-inf")], [1e-9] * 40):
            run = client.create_run("0")
            points = [Metric("loss/a b", value, 10 + step, step) for step, value in enumerate(values)]
            client.log_batch(run.info.run_id, points)
            client.log_text(run.info.run_id, "ten bytes.", "texts/a b.txt")
            ids.append(run.info.run_id)
        one_by_one = {each: client.get_metric_history(each, "loss/a b") for each in ids}
        found = store.metric_histories(ids, "loss/a b")
        (file,) = evidence.get_artifact_repository(run.info.artifact_uri).list_artifacts("texts")
        monkeypatch.setattr(store, "POINTS", 43)
        assert store.metric_histories(ids, "loss/a b") == {}
        others = evidence.Evidence(lambda experiment: "0", own=False)
        found_of_all = {run.info.run_id: others.history(run, "loss/a b") for run in others.runs}
    read, read_of_all, asked = (
        [sorted((p.step, str(p.value), p.timestamp) for p in histories[each]) for each in ids]
        for histories in (found, found_of_all, one_by_one)
    )
    assert read == read_of_all == asked and [*map(len, read)] == [3, 40]
    assert (file.path, file.is_dir, file.file_size) == ("texts/a b.txt", False, 10)
