"""Tracking: connect, provenance, truthful ends, models, links."""

import base64
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

from demo_lib import tracking
from demo_lib.config import ROOT, DemoError, TrainConfig
from demo_lib.data import batches, load_data
from demo_lib.model import build_model
from demo_lib.store import connect, open_store, own_model_name, own_name, ui_link
from demo_lib.tracking import provenance, signals, terminable, truthful_status

import mlflow
import pytest
import sqlalchemy
import torch
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from tests.tools.processes import normal_signals

RUN = """
import os, signal, sys, time
import mlflow
from demo_lib.tracking import provenance, truthful_status
from demo_lib.store import connect
connect("ends")
with mlflow.start_run(tags=provenance()) as run, truthful_status():
    mlflow.log_metrics({"loss": 1.0}, step=1)
    print(run.info.run_id, flush=True)
    time.sleep(60)
"""


def start_run_elsewhere():
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, env=os.environ, preexec_fn=normal_signals
    )
    return process, process.stdout.readline().strip()


def test_the_store_and_its_files_are_in_the_home_whatever_the_working_directory(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    connect("somewhere")
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "a.txt")
    assert mlflow.get_tracking_uri() == f"sqlite:///{home.as_posix()}/store/mlflow.db"
    assert list((home / "store" / "artifacts" / "somewhere" / run.info.run_id).rglob("a.txt"))
    assert not (tmp_path / "mlruns").exists() and not (tmp_path / "mlflow.db").exists()


def test_connecting_twice_gives_the_same_experiment(home):
    assert connect("same").experiment_id == connect("same").experiment_id


def test_a_deleted_experiment_is_named_and_what_to_do(home):
    experiment = connect("gone")
    MlflowClient().delete_experiment(experiment.experiment_id)
    with pytest.raises(DemoError, match=r"'gone' can't be used: .*You can restore the experiment"):
        connect("gone")


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "store").touch()
    monkeypatch.setenv("DEMO_HOME", str(tmp_path))
    with pytest.raises(DemoError, match=r"can't be used .*DEMO_HOME"):
        connect("anything")


@pytest.mark.parametrize("kind", ["refused", "silent", "unknown host"])
def test_an_unreachable_server_is_one_sentence_within_5_seconds(home, monkeypatch, kind):
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts connections, never answers
        port = listening.getsockname()[1]
        address = {"silent": f"127.0.0.1:{port}", "refused": "127.0.0.1:1", "unknown host": "no.such.host.invalid"}[
            kind
        ]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        started = time.monotonic()
        with pytest.raises(DemoError, match="no MLflow server answers at http://") as error:
            connect("anything")
        assert time.monotonic() - started < 5
    assert "secret" not in str(error.value)


def test_provenance_names_source_code_data_and_machine(home):
    config = TrainConfig(train_images=500, seed=3, device="cpu")
    data = load_data(config)
    connect("01_track_a_run")
    tags = provenance(data, config)
    assert tags["mlflow.source.name"] == "notebooks/01_track_a_run.ipynb"
    assert (tags["device"], tags["seed"], tags["data_digest"]) == ("cpu", "3", data.digest)
    assert tags["data_source"] == data.source
    assert tags["torch_version"] == torch.__version__.split("+")[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not in a git repository")
    assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    assert tags["git_dirty"] == str(bool(changed)).lower()


def test_without_git_only_the_commit_is_missing(home, monkeypatch, tmp_path):
    connect("anything")
    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    tags = provenance()
    assert "mlflow.source.git.commit" not in tags and tags["python_version"]


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("sqlite:///{home}/store", r"store can't be used \(.*Is a directory.*\): set DEMO_HOME or MLFLOW_TRACKING_URI"),
        (
            "sqlite:///{home}/store/mlflow.db?timeout=9",
            r"mlflow\.db\?timeout=9 can't be used: leave \? and % out of its",
        ),
        ("sqlite:///{home}/store/my%20mlflow.db", r"my%20mlflow\.db can't be used: leave \? and % out of its address"),
        ("mysql+none://me:secret@127.0.0.1/x", r"mysql\+none://127\.0\.0\.1/x can't be used \(Can't load plugin"),
        ("postgresql://me:sec/ret@127.0.0.1:1/x", r"postgresql://127\.0\.0\.1:1/x can't be used \(.*\): start it"),
        ("{home}/mlruns", "is no store: set it to a server's http address, to sqlite:/// and the path of a file"),
        ("foo://bar", "MLFLOW_TRACKING_URI = 'foo://bar' is no store"),
        ("sqlite://", "MLFLOW_TRACKING_URI = 'sqlite://' is no store"),
    ],
)
def test_an_address_that_is_no_store_is_one_sentence(home, monkeypatch, address, sentence):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(home=home))
    with pytest.raises(DemoError, match=sentence):
        connect("anything")


def test_a_file_that_is_no_database_is_one_sentence(home):
    (home / "store" / "mlflow.db").write_text("notes, " * 1000)
    with pytest.raises(DemoError, match=r"can't be used \(file is not a database\)"):
        open_store()


def test_sqlite_is_told_once_that_the_table_of_last_values_is_large(tmp_path, monkeypatch):
    """Without these statistics, sorting 10,000 runs by a metric takes 5 s, with them 0.04 s."""
    database = tmp_path / "of_mlflow_itself.db"
    SqlAlchemyStore(f"sqlite:///{database}", tmp_path.as_uri())._dispose_engine()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    for _ in range(2):
        open_store()
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT * FROM sqlite_stat1 WHERE tbl = 'latest_metrics'").fetchall() == [
            ("latest_metrics", "sqlite_autoindex_latest_metrics_1", "40000 400 1")
        ]


def test_an_exception_ends_the_run_failed_with_the_error(home):
    connect("ends")
    with pytest.raises(ZeroDivisionError), mlflow.start_run() as run, truthful_status():
        mlflow.log_param("before", 1)
        1 / 0  # noqa: B018
    ended = mlflow.get_run(run.info.run_id)
    assert (ended.info.status, ended.data.tags["error"]) == ("FAILED", "ZeroDivisionError: division by zero")
    assert ended.data.params == {"before": "1"}
    assert mlflow.active_run() is None


def test_an_interrupt_ends_the_run_and_those_nested_in_it_killed(home):
    connect("ends")
    with pytest.raises(KeyboardInterrupt), mlflow.start_run() as run, truthful_status():
        nested = mlflow.start_run(nested=True)
        raise KeyboardInterrupt
    assert [mlflow.get_run(each.info.run_id).info.status for each in (run, nested)] == ["KILLED", "KILLED"]
    assert mlflow.active_run() is None


@pytest.mark.parametrize("query", [1, 4, 9])
def test_an_interrupt_in_the_middle_of_a_query_leaves_the_store_open_to_write(home, query, request):
    """While its traceback lives, what was cut off would keep the SQLite file locked: the run could not be ended."""
    connect("signals")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    engine = mlflow.tracking._tracking_service.utils._get_store().engine
    met = []

    def interrupt(*arguments):
        met.append(time.monotonic())
        if len(met) == query:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), mlflow.start_run() as run, truthful_status():
        sqlalchemy.event.listen(engine, "after_cursor_execute", interrupt)
        request.addfinalizer(lambda: sqlalchemy.event.remove(engine, "after_cursor_execute", interrupt))
        for number in range(9):
            mlflow.log_param(f"p{number}", 1)
    assert time.monotonic() - met[query - 1] < 5  # MLflow waits 20 s for a lock
    assert mlflow.get_run(run.info.run_id).info.status == "KILLED"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_drops_comes_again(signum):
    """An exception in a `__del__` is printed and dropped: GitPython's, which each run calls, met one in seventy."""

    class Fragile:
        def __del__(self):
            signal.raise_signal(signum)

    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda *_: None}
    with signals(ours), pytest.raises(KeyboardInterrupt), terminable():
        Fragile()
        time.sleep(5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_run_is_closed_changes_nothing(home, signum, monkeypatch):
    connect("signals")
    close = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda *args: (signal.raise_signal(signum), close(*args)))
    with pytest.raises(KeyboardInterrupt), mlflow.start_run() as run, truthful_status():
        raise KeyboardInterrupt
    assert mlflow.get_run(run.info.run_id).info.status == "KILLED"


def test_success_ends_the_run_finished(home):
    connect("ends")
    with mlflow.start_run() as run, truthful_status():
        pass
    ended = mlflow.get_run(run.info.run_id)
    assert ended.info.status == "FINISHED" and "error" not in ended.data.tags


def test_truthful_status_needs_a_run(home):
    with pytest.raises(DemoError, match="needs an active run"), truthful_status():
        pass


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_a_signal_ends_the_run_killed_with_its_metrics(home, signum, code):
    connect("ends")
    process, run_id = start_run_elsewhere()
    process.send_signal(signum)
    ended_with = process.wait(30)
    assert ended_with == code or (signum == signal.SIGINT and ended_with in (1, 130, -signal.SIGINT))
    run = mlflow.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"loss": 1.0})


def test_a_run_left_by_a_killed_process_is_closed_by_the_next_connect(home):
    connect("ends")
    process, run_id = start_run_elsewhere()
    connect("ends")
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    process.kill()
    process.wait(30)
    connect("ends")
    run = mlflow.get_run(run_id)
    assert run.info.status == "KILLED" and "without closing" in run.data.tags["error"]


def test_a_logged_model_predicts_the_same_for_any_batch_size(home, recwarn):
    connect("models")
    config = TrainConfig(train_images=500, channels=4, device="cpu")
    data, model = load_data(config), build_model(config).train()
    images = next(batches(data.test, 7))[0]
    with mlflow.start_run():
        logged = tracking.log_model(model, "net", images[:2])
    assert model.training
    loaded = mlflow.pytorch.load_model(logged.model_uri)
    with torch.inference_mode():
        for size in (1, 7):
            torch.testing.assert_close(loaded(images[:size]), model.eval()(images[:size]))
    assert logged.signature.inputs.inputs[0].shape == (-1, 1, 28, 28)
    assert not [warning for warning in recwarn if "weights are not on CPU" in str(warning.message)]


def test_links_lead_to_the_local_ui_or_the_server_without_its_password(home, monkeypatch):
    experiment = connect("links")
    with mlflow.start_run(run_name="a <b>") as run:
        pass
    registered = MlflowClient().create_registered_model("my model")
    page = f"#/experiments/{experiment.experiment_id}/runs"
    assert str(ui_link(experiment)) == f"http://127.0.0.1:5050/{page}?workflowType=machine_learning"
    assert str(ui_link(run)).endswith(f"{page}/{run.info.run_id}?workflowType=machine_learning")
    assert "a &lt;b&gt;" in ui_link(run)._repr_html_()
    assert str(ui_link(registered)) == "http://127.0.0.1:5050/#/models/my%20model"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org/mlflow/")
    assert str(ui_link(experiment)) == f"https://example.org/mlflow/{page}?workflowType=machine_learning"


@pytest.mark.slow
def test_twenty_processes_start_on_a_fresh_store(tmp_path):
    code = "from demo_lib.store import connect; import mlflow; connect('crowd'); mlflow.start_run(); mlflow.end_run()"
    environment = os.environ | {"DEMO_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(20)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, errors
    client = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("crowd").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 20
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_names_are_ones_own_with_a_login_to_a_server_and_plain_otherwise(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert (own_name("train"), own_model_name("net")) == ("train", "net")
    assert connect("plain").name == "plain"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert own_name("train") == own_name(own_name("train")) == "ann/train"
    assert own_model_name("net") == own_model_name(own_model_name("net")) == "ann.net"
    assert own_name("shared/example") == "shared/example"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    assert (own_name("train"), own_model_name("net")) == ("train", "net")


def test_the_notebook_is_found_for_an_experiment_of_ones_own(home):
    connect("ann/01_track_a_run")
    assert provenance()["mlflow.source.name"] == "notebooks/01_track_a_run.ipynb"


def test_a_run_that_was_killed_and_deleted_does_not_stop_the_next_connect(home):
    experiment = connect("ends")
    client = MlflowClient()
    gone = client.create_run(experiment.experiment_id, tags={"process": dead_process()})
    odd = client.create_run(experiment.experiment_id, tags={"process": f"{socket.gethostname()}:x"})
    client.delete_run(gone.info.run_id)
    connect("ends")
    assert client.get_run(odd.info.run_id).info.status == "RUNNING"
    client.restore_run(gone.info.run_id)
    connect("ends")
    assert client.get_run(gone.info.run_id).info.status == "KILLED"


def dead_process():
    """Return the identity of a process that has ended."""
    code = "import os; from demo_lib.identity import identity; print(identity(os.getpid()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_git_answers_for_this_repository_also_in_a_hook_of_another(home, monkeypatch, tmp_path):
    connect("anything")
    before = provenance()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, place in {"GIT_DIR": tmp_path / ".git", "GIT_WORK_TREE": tmp_path}.items():
        monkeypatch.setenv(name, str(place))
    after = provenance()
    assert "mlflow.source.git.commit" in before and {name: after.get(name) for name in before} == before


def test_a_model_of_another_project_in_the_shell_gets_no_metrics(home):
    code = "import demo_lib, os; print('MLFLOW_ACTIVE_MODEL_ID' in os.environ)"
    given = os.environ | {"MLFLOW_ACTIVE_MODEL_ID": "m-123"}
    assert subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True).stdout == "False\n"


def test_an_interrupt_shows_one_line_in_a_notebook(home):
    connect("ends")
    with pytest.raises(KeyboardInterrupt) as caught, mlflow.start_run() as run, truthful_status():
        raise KeyboardInterrupt
    (line,) = caught.value._render_traceback_()
    assert line == f"KeyboardInterrupt: run {run.info.run_name} ({run.info.run_id}) ended KILLED."


SECOND = """
import requests
from demo_lib.store import connect
import mlflow
print(requests.get("{url}", timeout=5).text, mlflow.get_registry_uri())
"""


def test_what_the_shell_has_for_other_servers_is_not_used_for_this_machine(home):
    with HTTPServer(("127.0.0.1", 0), type("Echo", (BaseHTTPRequestHandler,), {"do_GET": echo})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            environment = os.environ | {name: "http://127.0.0.1:9", "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9"}
            environment |= {"NO_PROXY": "intern.example", "MLFLOW_TRACKING_URI": "sqlite:////nowhere/mlflow.db"}
            done = subprocess.run(
                [sys.executable, "-c", SECOND.format(url=url)], env=environment, capture_output=True, text=True
            )
            assert done.stdout.split() == ["none", "sqlite:////nowhere/mlflow.db"], done.stderr
        server.shutdown()


def echo(self):
    """Answer with the login that came."""
    self.send_response(200)
    self.end_headers()
    self.wfile.write(self.headers.get("Authorization", "none").encode())


def test_a_login_of_the_file_netrc_does_not_replace_the_explicit_one(home, monkeypatch, tmp_path):
    seen = []

    def answer(self):
        seen.append(base64.b64decode(self.headers["Authorization"].partition(" ")[2]).decode())
        self.send_response(403)
        self.end_headers()

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    with HTTPServer(("127.0.0.1", 0), type("Refuse", (BaseHTTPRequestHandler,), {"do_POST": answer})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(DemoError, match="refuses you"):
            open_store()
        server.shutdown()
    assert seen == ["ann:right"]
