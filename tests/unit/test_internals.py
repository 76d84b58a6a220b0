"""Each part of MLflow that it does not promise to keep still does what the project needs it for."""

from demo_lib import internals

import mlflow
import pytest
import sqlalchemy

from tests.tools.processes import mlflow_server


def test_the_login_is_found_where_mlflow_looks_for_it(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert internals.login("https://example.org") == "ann"
    assert internals.login("sqlite:///x.db") == ""


def test_one_request_is_sent_and_not_again(tmp_path):
    with mlflow_server(tmp_path) as uri:
        answer = internals.ask(uri, "/api/2.0/mlflow/experiments/search", json={"max_results": 1}, timeout=9)
    assert answer.json()["experiments"][0]["name"] == "Default"
    with pytest.raises(mlflow.MlflowException):
        internals.ask(uri, "/version", timeout=1)


def test_a_new_store_has_mlflows_tables_and_no_open_connection(tmp_path):
    internals.make_store(f"sqlite:///{tmp_path}/new.db", tmp_path.as_uri())
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/new.db")
    names = sqlalchemy.inspect(engine).get_table_names()
    (index,) = [each for each in names if each == "latest_metrics"]
    with engine.connect() as connection:  # `store.make_store` tells SQLite how large this one is
        found = connection.scalar(sqlalchemy.text(f"SELECT name FROM pragma_index_list('{index}') WHERE origin = 'pk'"))
    engine.dispose()
    assert found == "sqlite_autoindex_latest_metrics_1"
