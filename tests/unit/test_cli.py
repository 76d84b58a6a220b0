"""The command line: one call of a kind in a process of its own, as a user makes it, the others in this one."""

import errno
import shutil
import sys
import tempfile
from types import SimpleNamespace
from unittest.mock import Mock

from demo_lib.__main__ import main
from demo_lib.ops.processes import free_port
from demo_lib.store import connect

import mlflow
import pandas as pd
import psutil
import pytest
import requests
from mlflow import MlflowException

from tests.tools.processes import serving, wait_until

QUICK = ["--train-images", 600, "--epochs", 1, "--channels", 4, "--device", "cpu"]


@pytest.fixture
def call(home, capsys, monkeypatch):
    """Call the command line in this process, and return what `cli` does."""
    monkeypatch.chdir(home)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's
            code = error.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def test_train_logs_what_was_asked_for(home, cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 5\nepochs: 9\nlog_every: 2\n")
    done = cli("train", "--config", tmp_path / "mine.yaml", *QUICK, "--flip")
    assert done.returncode == 0, done.stderr
    assert "fashion-mnist" in done.stdout and "test accuracy" in done.stdout
    assert not done.stderr
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["train"], output_format="list")
    assert run.info.run_id in done.stdout
    assert run.info.status == "FINISHED"
    expected = {"seed": "5", "epochs": "1", "log_every": "2", "flip": "True", "channels": "4"}
    assert expected.items() <= run.data.params.items()
    assert {"test_accuracy", "val_accuracy", "train_loss", "fit_seconds"} <= run.data.metrics.keys()
    assert run.data.tags["mlflow.source.name"].startswith("python -m demo_lib train --config")
    assert {entry.tags[0].value for entry in run.inputs.dataset_inputs} == {"training", "validation"}
    models = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    assert {model.name for model in models} == {"best_model", "last_model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs", "0"], "epochs = '0' is not allowed: it should be greater than or equal to 1."),
        (["train", "--config", "none.yaml"], "none.yaml can't be read"),
        (["train", "--epoch", "1"], "unrecognized arguments: --epoch"),
        (["train", "--flip", "maybe"], "flip = 'maybe' is not allowed: it should be a valid boolean, unable to"),
        (["run", "77"], "there is no lesson '77'; there are: 00_start_here"),
        (["run", "01", "-p", "epochs", "x"], "parameter epochs = 'x' must be of type int."),
        (["run", "-f", "none.yaml"], "none.yaml can't be read"),
        (["run", "--out", "x"], "unrecognized arguments: --out"),
        (["export", "zz", "--to", "a.csv"], "no run's id begins with 'zz' (at least 4 digits and letters a-f)"),
        (["plot", "ffffffff"], "no run's id begins with 'ffffffff'"),
        (["reproduce", "zz"], "no run's id begins with 'zz' (at least 4 digits and letters a-f)"),
        (["tune", "--trials", "0"], "trials = '0' is not allowed: it should be greater than or equal to 1."),
        (["tune", "--study", " "], "study = ' ' is not allowed: it should have at least 1 character."),
        (["run", "00", "--output", "/proc/x"], "the folder /proc/x can't be made"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(call, arguments, message):
    done = call(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 6


@pytest.mark.parametrize(
    ("variable", "address", "arguments"),
    [
        ("MLFLOW_TRACKING_URI", "ftp://ann:geheim@host", ["plot", "abcd"]),
        ("MLFLOW_TRACKING_URI", "http://ann:geheim@127.0.0.1:9", ["ui"]),
        ("DEMO_STORAGE", "postgresql://ann:geheim@127.0.0.1:9/db", ["tune", "--trials", "1"]),
    ],
)
def test_no_sentence_shows_a_password(call, monkeypatch, variable, address, arguments):
    monkeypatch.setenv(variable, address)
    done = call(*arguments)
    assert done.returncode == 2 and "geheim" not in done.stdout + done.stderr


def test_the_ui_ends_with_the_command_however_it_ends(home, monkeypatch):
    port = free_port()
    monkeypatch.setenv("DEMO_UI_PORT", str(port))
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "elsewhere.example")  # of another server
    with serving([sys.executable, "-m", "demo_lib", "ui"], f"http://127.0.0.1:{port}/health") as command:
        assert requests.get(f"http://127.0.0.1:{port}/version").ok
        server = psutil.Process(command.pid).children(recursive=True)
        assert not [each for each in server if "sqlite" in " ".join(each.cmdline())]  # an address may hold a password
        command.kill()
        wait_until(lambda: not [each for each in server if each.is_running()])


def test_bad_input_ends_the_process_with_2_and_no_traceback(cli):
    done = cli("train", "--epochs", "0")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "epochs = '0' is not allowed: it should be greater than or equal to 1." in done.stderr


def test_a_run_is_plotted_exported_and_trained_again_to_the_bit(cli, call, tmp_path):
    assert call("train", *QUICK).returncode == 0
    (first,) = mlflow.search_runs(experiment_names=["train"], output_format="list")
    prefix = first.info.run_id[:6]
    assert "logged loss_curve.png" in call("plot", prefix).stdout
    assert "loss_curve.png" in {file.path for file in mlflow.artifacts.list_artifacts(run_id=first.info.run_id)}
    for name in ("again.yaml", "metrics.csv", "metrics.parquet"):
        assert call("export", prefix, "--to", tmp_path / name).returncode == 0
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == len(pd.read_parquet(tmp_path / "metrics.parquet"))
    refused = call("export", prefix, "--to", tmp_path / "metrics.doc")
    assert refused.returncode == 2 and ".csv or .parquet or, for the configuration, in .yaml" in refused.stderr
    assert cli("train", "--config", tmp_path / "again.yaml").returncode == 0
    second = mlflow.search_runs(experiment_names=["train"], output_format="list")[0]
    assert second.info.run_id != first.info.run_id
    losses = [
        [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, "train_loss")]
        for run in (first, second)
    ]
    assert losses[0] == losses[1]


def test_help_lists_every_field_with_its_default(call):
    text = call("train", "--help").stdout
    for option in ("--epochs", "--learning-rate", "--flip [true|false]", "--device {auto,cpu,cuda,mps}"):
        assert option in text
    assert "(default: 128)" in text


def test_doctor_is_content_and_says_what_is_wrong(home, call, monkeypatch):
    good = call("doctor")
    assert good.returncode == 0, good.stdout
    assert [line[6:14].strip() for line in good.stdout.splitlines()] == ["packages", "data", "store", "disk"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("DEMO_DATA_DIR", str(home))
    bad = call("doctor")
    assert bad.returncode == 1
    assert "FIX   store      no MLflow server answers at http://127.0.0.1:1" in bad.stdout
    assert "FIX   data" in bad.stdout and "put Fashion-MNIST's four files there" in bad.stdout


def test_run_reports_and_exits_truthfully(home, cli):
    done = cli("run", "00", "-p", "train_images", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "00_start_here  FINISHED" in done.stdout and "-m demo_lib ui" in done.stdout
    assert (home / "build" / "00_start_here.ipynb").exists() and (home / "build" / "00_start_here.html").exists()
    failed = cli("run", "00", "-p", "train_images", "3")
    assert failed.returncode == 1
    assert "train_images = 3 is not allowed: it should be greater than or equal to 200." in failed.stdout


def test_what_the_store_says_while_it_works_is_one_line(call, monkeypatch):
    sql = "(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO metrics ...]"
    for error in (MlflowException(sql), OSError(errno.ENOSPC, "No space left on device")):
        monkeypatch.setattr("demo_lib.recipe.train", Mock(side_effect=error))
        done = call("train", *QUICK)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
        assert "is full" in done.stderr or "No space left" in done.stderr
    monkeypatch.setattr("demo_lib.recipe.train", Mock(side_effect=ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):  # with its traceback
        call("train", *QUICK)


def test_a_folder_that_was_deleted_is_named(cli, home, call, monkeypatch):
    (home / "gone").mkdir()
    monkeypatch.chdir(home / "gone")
    (home / "gone").rmdir()
    code = main(["doctor"])
    monkeypatch.chdir(home)
    assert code == 2


def test_a_run_without_losses_is_not_plotted(call, home):
    connect("plain")
    with mlflow.start_run() as run:
        pass
    done = call("plot", run.info.run_id)
    assert done.returncode == 2 and "has logged no loss: choose a run that trained a network." in done.stderr


def test_doctor_says_all_that_it_can_where_the_store_is_of_no_use(call, monkeypatch, home):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:1/mlflow")
    done = call("doctor")
    packages, data, store, disk = done.stdout.splitlines()
    assert done.returncode == 1 and "secret" not in done.stdout
    assert packages.startswith("ok ") and data.startswith("ok ") and disk.startswith("ok ")
    assert store.startswith("FIX   store      the database")


def test_doctor_names_a_disk_that_is_nearly_full(monkeypatch, tmp_path, call):
    free = {str(tmp_path): 30e6}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(str(path), real(path).free + 1e9))
    )
    assert f"FIX   disk       30 MB free in {tmp_path}: free 500 MB, or set" in call("doctor").stdout


def test_without_the_lessons_a_sentence_says_what_to_install(call, monkeypatch, tmp_path):
    monkeypatch.setattr("demo_lib.config.LESSONS", tmp_path)
    for command in (["run"], ["run", "01"]):
        done = call(*command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: the lessons are not in {tmp_path}: clone the repository, and there run")
    assert "the lessons are not in" in call("doctor").stdout
