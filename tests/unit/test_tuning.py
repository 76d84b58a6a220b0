"""Studies: family trees as the store shows them, every state, interruption, death of a worker, resumption."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from demo_lib import study as study_of_optuna
from demo_lib import tuning
from demo_lib.config import DemoError, TuneConfig
from demo_lib.ops.workers import join
from demo_lib.ops.workers import tune as tune_with_workers
from demo_lib.study import open_storage, open_study, study_figures
from demo_lib.tuning import suggest, tune

import matplotlib.pyplot as plt
import mlflow
import nbformat
import optuna
import papermill as pm
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState
from PIL import Image

from tests.tools.pictures import is_whole
from tests.tools.processes import PATIENCE, normal_signals

TINY = {"train_images": 300, "epochs": 2, "max_channels": 4, "device": "cpu", "prune": False}
ENDS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


def config(**values):
    return TuneConfig(**TINY | values)


def family(experiment="tune"):
    """Return the parents, and the children by trial number, of all runs of the experiment."""
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    numbered = {int(run.data.tags["trial_number"]): run for run in children}
    assert len(numbered) == len(children), "two children of one trial"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {run.info.run_id for run in parents}
    return parents, numbered


def check_study(home, name, trials, interrupted=False):
    """Exactly `trials` finished-or-pruned trials, one child each, one parent, nothing left running.

    Failed trials have a child, too, but for one that an interrupt met before it had opened its run.
    """
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{home}/store/optuna.db")
    states = Counter(trial.state.name for trial in study.trials)
    assert states["COMPLETE"] + states["PRUNED"] == trials and not states["RUNNING"] and not states["WAITING"]
    parents, children = family()
    parents = [run for run in parents if run.data.tags["study"] == name]
    assert len(parents) == 1
    mine = {number: run for number, run in children.items() if run.data.tags["study"] == name}
    childless = [trial for trial in study.trials if trial.number not in mine]
    if interrupted:
        childless = [trial for trial in childless if trial.state.name != "FAIL" or "run_id" in trial.user_attrs]
    assert not childless and mine.keys() <= {trial.number for trial in study.trials}
    assert not [run for run in mine.values() if run.info.status == "RUNNING"]
    return study, parents[0], mine


def start(*arguments):
    command = [sys.executable, "-m", "demo_lib", "tune", "--prune", "false", "--train-images", "600", "--epochs", "3"]
    return subprocess.Popen(
        [*command, "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=normal_signals,
    )


def await_children(count):
    """Wait until so many trials have begun and one is running."""
    patience = time.monotonic() + PATIENCE
    while time.monotonic() < patience:
        if MlflowClient().get_experiment_by_name("tune"):
            children = family()[1].values()
            if len(children) >= count and any(run.info.status == "RUNNING" for run in children):
                return
        time.sleep(0.1)
    raise AssertionError("the study does not start")


@pytest.mark.parametrize(("workers", "storage"), [(1, None), (1, "memory"), (3, None)])
def test_the_family_is_right_in_one_process_in_memory_and_in_processes(home, workers, storage):
    parent = tune_with_workers(config(trials=6, workers=workers), storage=storage)
    parents, children = family()
    assert [run.info.run_id for run in parents] == [parent.info.run_id]
    assert sorted(children) == list(range(6))
    for run in children.values():
        assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "COMPLETE")
        assert {"learning_rate", "batch_size", "channels", "dropout"} <= run.data.params.keys()
        assert len(MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")) == 2
    best = max(children.values(), key=lambda run: run.data.metrics["val_accuracy"])
    tags, metrics = parent.data.tags, parent.data.metrics
    winner = children[int(tags["best_trial"])]
    assert tags["best_run_id"] == winner.info.run_id
    assert metrics["best_val_accuracy"] >= best.data.metrics["val_accuracy"]
    assert tags["best_learning_rate"] == winner.data.params["learning_rate"]
    assert 0 < metrics["test_accuracy"] < 1
    (model,) = mlflow.search_logged_models([parent.info.experiment_id], output_format="list")
    assert model.source_run_id == parent.info.run_id and model.name == "best_model"
    assert {file.path for file in MlflowClient().list_artifacts(parent.info.run_id, "study")} == {
        f"study/{name}.png"
        for name in ("optimization_history", "intermediate_values", "parallel_coordinate", "param_importances")
    }


def test_every_state_of_a_trial_is_the_state_of_its_run(home, monkeypatch):
    def objective(trial, train, data):
        if trial.number == 1:
            return None
        if trial.number == 2:
            raise ZeroDivisionError("no images")
        return real(trial, train, data)

    real = tuning._fit_trial
    monkeypatch.setattr(tuning, "_fit_trial", objective)
    parent = tune(config(trials=4), storage="memory")
    assert parent.info.status == "FINISHED"
    children = family()[1]
    states = [children[number].data.tags["trial_state"] for number in range(4)]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert [children[number].info.status for number in range(4)] == [ENDS[state] for state in states]
    assert children[2].data.tags["error"] == "ZeroDivisionError: no images"


def test_a_study_of_errors_says_so(home, monkeypatch):
    monkeypatch.setattr(tuning, "_fit_trial", lambda *args: 1 / 0)
    with pytest.raises(DemoError, match="no trial was completed"):
        tune(config(trials=2), storage="memory")
    assert family()[0][0].info.status == "FAILED"


def test_bad_trials_are_pruned(home):
    tune(config(trials=14, epochs=4, train_images=600, prune=True), storage="memory")
    states = Counter(run.data.tags["trial_state"] for run in family()[1].values())
    assert states["PRUNED"] and states["COMPLETE"] >= 5


def test_a_study_goes_on_in_the_same_parent_run(home):
    first = tune(config(trials=2, study="on"))
    second = tune(config(trials=5, study="on"))
    assert second.info.run_id == first.info.run_id
    study, parent, _ = check_study(home, "on", 5)
    assert parent.info.status == "FINISHED"
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 5
    assert tune(config(trials=5, study="on")).info.run_id == first.info.run_id
    check_study(home, "on", 5)


def test_a_study_does_not_go_on_without_its_parent_run(home):
    first = tune(config(trials=1, study="on"))
    MlflowClient().delete_run(first.info.run_id)
    with pytest.raises(DemoError, match=f"is deleted, or .*and `mlflow runs restore --run-id {first.info.run_id}`"):
        tune(config(trials=2, study="on"))
    open_study(config(study="on")).set_user_attr("parent_run_id", "f" * 32)
    with pytest.raises(DemoError, match="is deleted, or not in the store sqlite"):
        tune(config(trials=2, study="on"))


def test_a_study_does_not_go_on_with_another_configuration(home):
    tune(config(trials=1, study="on"))
    with pytest.raises(DemoError, match=r"study 'on' was begun with epochs = 2, not 1: keep it, or give"):
        tune(config(trials=2, study="on", epochs=1))


@pytest.mark.slow
def test_two_studies_at_once_keep_apart(home):
    processes = [start("--study", name, "--trials", "3") for name in ("a", "b")]
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("tune").experiment_id])
    parents = {run.info.run_id: run.data.tags["study"] for run in found if "mlflow.parentRunId" not in run.data.tags}
    assert sorted(parents.values()) == ["a", "b"]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert Counter(run.data.tags["study"] for run in children) == {"a": 3, "b": 3}
    assert all(parents[run.data.tags["mlflow.parentRunId"]] == run.data.tags["study"] for run in children)


@pytest.mark.parametrize("written", ["store/mlflow.db", "store/../store/mlflow.db"])
def test_mlflows_database_is_refused(home, written):
    with pytest.raises(DemoError, match="is MLflow's database: give Optuna one of its own"):
        open_study(config(), f"sqlite:///{home}/{written}")


def test_a_study_goes_on_in_the_experiment_of_its_parent(home):
    first = tune(config(trials=1, study="on"), experiment="first")
    assert tune(config(trials=2, study="on")).info.run_id == first.info.run_id
    experiment = mlflow.get_experiment_by_name("first").experiment_id
    assert len(mlflow.search_runs([experiment])) == 3
    assert mlflow.search_runs(experiment_names=["tune"]).empty


def test_optunas_plots_leave_the_style_of_others_alone(home):
    before, open_figures = dict(plt.rcParams), plt.get_fignums()
    study = open_study(config(), "memory")
    study.optimize(lambda trial: suggest(trial, config()).dropout, n_trials=5)
    assert list(study_figures(study)) == [
        "optimization_history",
        "intermediate_values",
        "parallel_coordinate",
        "param_importances",
    ]
    assert dict(plt.rcParams) == before and plt.get_fignums() == open_figures


@pytest.mark.parametrize("trials", [1, 4, 12, 30])
def test_the_figures_of_a_study_are_whole_and_count_in_whole_numbers(trials, home):
    def objective(trial):
        value = suggest(trial, config()).dropout
        for epoch in (1, 2, 3):
            trial.report(value, epoch)
        return value

    study = open_study(config(), "memory")
    study.optimize(objective, n_trials=trials)
    figures = study_figures(study)
    assert ("param_importances" in figures) == (trials >= 4)
    for name, figure in figures.items():
        drawn = io.BytesIO()
        figure.savefig(drawn)
        assert is_whole(Image.open(drawn)), name
    for name in ("optimization_history", "intermediate_values"):
        figures[name].canvas.draw()
        labels = [label.get_text().replace("\N{MINUS SIGN}", "-") for label in figures[name].axes[0].get_xticklabels()]
        assert labels and all(re.fullmatch(r"-?\d+", label) for label in labels), (name, labels)
    assert len(figures["parallel_coordinate"].axes[0].collections[0].get_segments()) == trials


def test_a_studys_figures_drawn_first_in_a_kernel_hide_no_later_figure(tmp_path, home, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    cells = [
        "from demo_lib.config import TuneConfig\n"
        "from demo_lib.study import open_study, study_figures\n"
        "from demo_lib.tuning import suggest\n"
        "config = TuneConfig()\n"
        "study = open_study(config, 'memory')\n"
        "study.optimize(lambda trial: suggest(trial, config).dropout, n_trials=2)\n"
        "figures = study_figures(study)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "figures['optimization_history']",
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
    nbformat.write(made, tmp_path / "first.ipynb")
    done = pm.execute_notebook(tmp_path / "first.ipynb", tmp_path / "done.ipynb", progress_bar=False)
    assert [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in done.cells] == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_everything_killed_and_the_study_goes_on(home, workers):
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    process = start("--study", "c", "--trials", "4", "--workers", workers)
    await_children(2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "the same command or call goes on with study 'c'" in output
    parents, children = family()
    assert [run.info.status for run in parents] == ["KILLED"]
    assert {run.info.status for run in children.values()} <= {"KILLED", "FINISHED"}
    assert "KILLED" in {run.info.status for run in children.values()}
    again = start("--study", "c", "--trials", "4", "--workers", workers)
    output, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    assert re.search(r"best of 4 trials", output)
    assert check_study(home, "c", 4, interrupted=True)[1].info.status == "FINISHED"


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(home):
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    process = start("--study", "k", "--trials", "4", "--workers", "2")
    await_children(2)
    running = [run for run in family()[1].values() if run.info.status == "RUNNING"]
    os.kill(int(running[0].data.tags["process"].split(":")[-2]), signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    study, parent, children = check_study(home, "k", 4)
    assert parent.info.status == "FINISHED" and len(study.trials) == 5
    assert children[int(running[0].data.tags["trial_number"])].info.status == "KILLED"


@pytest.mark.slow
def test_a_study_killed_whole_goes_on(home):
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    process = start("--study", "w", "--trials", "4")
    await_children(1)
    process.kill()
    process.wait(30)
    again = start("--study", "w", "--trials", "4")
    _, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    _, parent, _ = check_study(home, "w", 4)
    assert parent.info.status == "FINISHED"


WORKER = """
import signal, sqlalchemy
from demo_lib.ops.workers import join


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "after_cursor_execute")
def interrupt(connection, cursor, statement, *rest):
    if statement.startswith("INSERT INTO trial_params"):
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "after_cursor_execute", interrupt)
        signal.raise_signal(signal.SIGTERM)


join("q")
"""


def begin(name):
    """Begin a study as its coordinator does, without a trial of it."""
    study = config(study=name, trials=2)
    with pytest.raises(DemoError, match="no worker finished a trial: run with one worker to see why"):
        tune(study, work=lambda *args: (None for _ in ()))
    return study


def test_a_worker_stays_and_tries_again_what_one_that_died_elsewhere_was_in(home, monkeypatch):
    monkeypatch.setattr(study_of_optuna, "HEARTBEAT", 1)
    monkeypatch.setattr(study_of_optuna, "GRACE", 2)
    begin("e")
    study = optuna.load_study(study_name="e", storage=open_storage())
    dead = study.ask()
    dead.set_user_attr("process", "another machine:::1:1")
    study._storage.record_heartbeat(dead._trial_id)
    client, parent = MlflowClient(), mlflow.get_run(study.user_attrs["parent_run_id"]).info
    tags = {"mlflow.parentRunId": parent.run_id, "trial_number": "0"}
    client.create_run(parent.experiment_id, tags=tags)  # it died before the trial knew of its run
    join("e")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [family()[1][number].info.status for number in range(3)] == ["KILLED", "FINISHED", "FINISHED"]


@pytest.mark.slow
def test_workers_that_come_when_another_does_the_last_trial_wait_for_it(home):
    begin("last")
    study = optuna.load_study(study_name="last", storage=open_storage())
    trials = [study.ask() for _ in range(2)]

    def fail(trial):
        trial.set_user_attr("error", "an error of its own")
        study.tell(trial, state=TrialState.FAIL)

    fail(trials[0])
    threading.Timer(15, fail, [trials[1]]).start()
    with pytest.raises(DemoError, match="no trial was completed"):
        tune_with_workers(config(study="last", trials=2, workers=2))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL"]


def test_workers_with_other_images_are_refused(home):
    begin("images")
    study = optuna.load_study(study_name="images", storage=open_storage())
    MlflowClient().set_tag(study.user_attrs["parent_run_id"], "data_digest", "another")
    with pytest.raises(DemoError, match=r"this machine has other images .* than the study: set DEMO_DATA_DIR"):
        join("images")


def test_a_worker_stopped_in_the_middle_of_a_query_ends_its_trial(home):
    study = begin("q")
    ended = subprocess.run(
        [sys.executable, "-c", WORKER], env=os.environ, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")
    assert [trial.state for trial in open_study(study).trials] == [optuna.trial.TrialState.FAIL]


def test_workers_that_join_take_no_more_trials_than_the_study_has(cli):
    begin("j")
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: cli("tune", "--join", "j"), range(3)))
    assert [each.returncode for each in done] == [0, 0, 0], done
    children = family()[1].values()
    assert [run.info.status for run in children] == ["FINISHED"] * 2
    assert len({run.data.tags["process"] for run in children}) <= 2
    late = cli("tune", "--join", "j")
    assert late.returncode == 0 and len(family()[1]) == 2


def test_several_workers_are_not_mistaken_for_one(home):
    with pytest.raises(DemoError, match=r"workers = 2 are processes: call `tune` of demo_lib\.ops\.workers"):
        tune(config(workers=2))


def test_a_study_that_nobody_began_cannot_be_joined(cli):
    answer = cli("tune", "--join", "nothing")
    assert answer.returncode == 2 and answer.stderr.startswith("error: no study 'nothing' has begun: begin it with")
