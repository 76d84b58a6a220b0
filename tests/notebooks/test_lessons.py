"""Every lesson: its anatomy, and what it leaves in the store when papermill and nbval run it."""

import os
import re
import subprocess
import sys

from demo_lib.batch import LESSONS, lessons
from demo_lib.config import ROOT, TrainConfig

import mlflow
import nbformat
import pandas as pd
import papermill as pm
import pytest
import torch
import yaml
from mlflow import MlflowClient

from tests.tools.processes import scoring_servers, wait_until

NAMES = [path.stem for path in lessons()]
OTHER = {
    "train_images": 1_500,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 0.005,
    "weight_decay": 0.0,
    "channels": 8,
    "dropout": 0.1,
    "flip": True,
    "log_every": 7,
    "seed": 4,
    "device": "cpu",
    "trials": 5,
    "max_channels": 8,
    "study": "other",
    "model_name": "other",
    "score_images": 700,
    "seconds": 0.05,
    "traced_calls": 3,
}


def read(name):
    return nbformat.read(LESSONS / f"{name}.ipynb", as_version=4)


def text(name):
    return "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")


def run_lesson(name, folder, params):
    """Execute the lesson with papermill and return the executed notebook."""
    return pm.execute_notebook(
        LESSONS / f"{name}.ipynb", folder / f"{name}.ipynb", params, cwd=LESSONS, progress_bar=False
    )


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_committed_clean(name):
    notebook = read(name)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert "papermill" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_has_all_its_parts(name):
    cells, words = read(name).cells, text(name)
    assert re.match(r"# \w", cells[0].source)
    for part in ("**What you'll do:**", "**What you'll learn**", "## What you need", "**Try it.**", "## Recap"):
        assert part in words, part
    assert "## In practice" in words
    goals = words.split("**What you'll learn**")[1].split("##")[0].count("\n- ")
    recap = words.split("## Recap")[1].split("##")[0].count("\n- ")
    assert 2 <= goals <= 4 and recap == goals
    sections = [line for line in words.splitlines() if line.startswith("## ")]
    assert 3 <= len(sections) - 3 <= 5
    assert len(cells) <= 45
    lengths = sorted(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")
    assert lengths[len(lengths) // 2] <= 5 and lengths[-1] <= 25
    kinds = "".join(cell.cell_type[0] for cell in cells)
    assert "cccc" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_lesson_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text(name)):
        assert (LESSONS / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "notebooks/00_start_here.ipynb"])
def test_the_maps_name_every_lesson(page):
    content = (ROOT / page).read_text()
    for name in NAMES:
        assert f"{name}.ipynb" in content, name


def test_the_parameters_of_lesson_01_are_those_of_the_configuration():
    inspected = pm.inspect_notebook(LESSONS / "01_track_a_run.ipynb")
    defaults = {name: yaml.safe_load(each["default"]) for name, each in inspected.items()}
    assert TrainConfig(**defaults) == TrainConfig()
    assert list(inspected) == list(TrainConfig.model_fields)
    assert all(each["help"] for each in inspected.values())


def test_the_parameter_files_fit():
    assert TrainConfig.from_yaml(LESSONS / "params" / "quick.yaml") == TrainConfig()
    assert TrainConfig.from_yaml(LESSONS / "params" / "full.yaml").train_images == 60_000


def check_lesson_00(params):
    (run,) = mlflow.search_runs(experiment_names=["00_start_here"], output_format="list")
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert int(run.data.params["train_images"]) == params["train_images"]
    assert 60 < run.data.metrics["mean_pixel"] < 85


def check_lesson_01(params):
    client = MlflowClient()
    runs = {
        run.info.run_name: run for run in mlflow.search_runs(experiment_names=["01_track_a_run"], output_format="list")
    }
    assert set(runs) == {"baseline", "doomed"}
    run, doomed = runs["baseline"], runs["doomed"]
    assert doomed.info.status == "FAILED" and doomed.data.tags["error"].startswith("ValueError: the loss")
    assert run.info.status == "FINISHED"
    assert TrainConfig.from_params(run.data.params) == TrainConfig(**params)
    train = client.get_metric_history(run.info.run_id, "train_loss")
    steps = [point.step for point in train]
    assert steps == sorted(set(steps)) and len(steps) > params["epochs"]
    validation = client.get_metric_history(run.info.run_id, "val_accuracy")
    assert len(validation) == params["epochs"] and validation[-1].step == steps[-1]
    assert train[-1].value < train[0].value
    assert 0.7 < run.data.metrics["test_accuracy"] < 1
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "model_summary.txt",
        "mistakes.png",
        "confusion_matrix.png",
    }
    assert {"mlflow.source.git.commit", "git_dirty", "data_digest", "device", "seed"} <= run.data.tags.keys()
    models = {
        model.name: model for model in mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    }
    assert set(models) == {"best_model", "last_model"}
    best = max(validation, key=lambda point: (point.value, -point.step)).step
    linked = {metric.key: metric.value for metric in models["best_model"].metrics if metric.step == best}
    assert linked["test_accuracy"] == run.data.metrics["test_accuracy"] and "val_accuracy" in linked
    check_models_reload(models, params, run)


def check_models_reload(models, params, run):
    """The best model, loaded back, has the test accuracy that was logged."""
    from demo_lib.data import batches, load_data

    data = load_data(TrainConfig(**params))
    loaded = mlflow.pytorch.load_model(models["best_model"].model_uri)
    with torch.inference_mode():
        right = [(loaded(images).argmax(1) == labels).float().sum() for images, labels in batches(data.test, 500)]
    assert sum(right).item() / len(data.test) == pytest.approx(run.data.metrics["test_accuracy"], abs=1e-6)


def families(experiment):
    """Return {parent's name: (parent, its children)} of an experiment, and the names of runs with no family."""
    found = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    top = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    of = {run.info.run_id: [] for run in top}
    for run in found:
        if parent := run.data.tags.get("mlflow.parentRunId"):
            of[parent].append(run)
    return {run.info.run_name: (run, of[run.info.run_id]) for run in top}


def check_lesson_02(params):
    tree = families("02_tune_with_nested_runs")
    parent, children = tree["by hand"]
    assert len(children) == params["trials"]
    assert {run.info.status for run in children} <= {"FINISHED", "KILLED"}
    assert parent.info.status == "FINISHED"
    winner = mlflow.get_run(parent.data.tags["best_run_id"])
    assert winner.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics["best_val_accuracy"] == winner.data.metrics["val_accuracy"]
    assert winner.data.params["learning_rate"] == parent.data.tags["best_learning_rate"]
    assert all(int(run.data.params["channels"]) <= params["max_channels"] for run in children)
    plots = {file.path for file in MlflowClient().list_artifacts(parent.info.run_id, "study")}
    assert {"study/optimization_history.png", "study/parallel_coordinate.png"} <= plots
    assert len(tree["parallel, right"][1]) == 6 and not tree["parallel, wrong"][1]
    assert len([name for name in tree if name.startswith("toy ")]) >= 1
    (name,) = [name for name in tree if name.startswith(f"{params['study']}-")]
    resumed, trials = tree[name]
    done = [run for run in trials if run.data.tags["trial_state"] in ("COMPLETE", "PRUNED")]
    assert resumed.info.status == "FINISHED" and len(done) == 4
    assert not [run for _, (top, below) in tree.items() for run in (top, *below) if run.info.status == "RUNNING"]


def check_lesson_03(params):
    tree = families("03_query_and_plot_runs")
    parent, children = tree["queried"]
    assert parent.info.status == "FINISHED" and len(children) == params["trials"]
    best = max(children, key=lambda run: run.data.metrics["val_accuracy"])
    files = {run.info.run_id: MlflowClient().list_artifacts(run.info.run_id) for run in children}
    plotted = [run for run in children if "loss_curve.png" in {file.path for file in files[run.info.run_id]}]
    assert len(plotted) == 1
    assert plotted[0].data.metrics["val_accuracy"] == best.data.metrics["val_accuracy"]
    baseline = families("01_track_a_run")["baseline"][0]
    assert TrainConfig.from_params(baseline.data.params) == TrainConfig.from_params(plotted[0].data.params)
    client = MlflowClient()
    for metric in ("train_loss", "val_loss"):
        first, second = (
            [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
            for run in (plotted[0], baseline)
        )
        assert first == second


def load_table(run, name):
    return pd.read_parquet(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name))


def check_lesson_06(params):
    client, name = MlflowClient(), params["model_name"]
    champion = client.get_model_version_by_alias(name, "champion")
    found = mlflow.search_runs(experiment_names=["06_serve_a_model"], output_format="list")
    runs = {run.info.run_name: run for run in found}
    assert set(runs) == {"offline scoring", "call times", "traced"}
    assert {run.info.status for run in found} == {"FINISHED"}
    offline = runs["offline scoring"]
    assert offline.data.params == {"model_name": name, "model_version": str(champion.version)}
    scored = load_table(offline, "predictions.parquet")
    assert len(scored) == params["score_images"]
    accuracy = (scored.label == scored.truth).mean()
    assert accuracy > 0.5 and offline.data.metrics["test_accuracy"] == pytest.approx(accuracy)
    (model,) = mlflow.get_run(offline.info.run_id).inputs.model_inputs  # search_runs leaves them out
    assert champion.source == f"models:/{model.model_id}"
    timings = load_table(runs["call times"], "call_times.parquet")
    assert len(timings) == 9 and (timings.milliseconds > 0).all()
    medians = timings.set_index(["way", "images"]).milliseconds
    assert all(medians[way, 256] > medians[way, 1] for way in ("HTTP", "pyfunc", "network"))
    traces = mlflow.search_traces(
        locations=[offline.info.experiment_id], run_id=runs["traced"].info.run_id, return_type="list"
    )
    assert len(traces) == params["traced_calls"]
    assert {trace.info.trace_metadata["mlflow.modelId"] for trace in traces} == {model.model_id}
    assert {tuple(span.name for span in trace.data.spans) for trace in traces} == {
        ("classify", "scale", "network", "label")
    }
    assert max(len(trace.to_json()) for trace in traces) < 10_000, "a trace holds whole images"
    assert not scoring_servers(os.environ["DEMO_HOME"])


CHECKS = {
    "00_start_here": check_lesson_00,
    "01_track_a_run": check_lesson_01,
    "02_tune_with_nested_runs": check_lesson_02,
    "03_query_and_plot_runs": check_lesson_03,
    "06_serve_a_model": check_lesson_06,
}


def params_of(name):
    return {key: value for key, value in OTHER.items() if key in pm.inspect_notebook(LESSONS / f"{name}.ipynb")}


def test_every_lesson_has_a_check():
    assert list(CHECKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_with_other_parameters_as_the_store_shows_and_again_under_nbval(
    name, home, tmp_path, monkeypatch
):
    executed = run_lesson(name, tmp_path, params_of(name))
    red = [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert not red
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/store/mlflow.db")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    CHECKS[name](params_of(name))
    run_under_nbval(name)
    runs = mlflow.search_runs(experiment_names=[name], output_format="list")
    assert "FINISHED" in {run.info.status for run in runs} and "RUNNING" not in {run.info.status for run in runs}


def run_under_nbval(name):
    """Run the lesson with its defaults, in the notebook's folder and on what the store has by then."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(LESSONS), "-c", os.devnull, str(LESSONS / f"{name}.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_on_a_server(name, home, tmp_path, monkeypatch, tracking_server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    run_lesson(name, tmp_path, params_of(name))
    mlflow.set_tracking_uri(tracking_server)
    CHECKS[name](params_of(name))
    assert not (home / "store" / "artifacts").exists()


def test_a_failing_cell_of_lesson_06_leaves_no_server(home, tmp_path):
    notebook = read("06_serve_a_model")
    started = next(index for index, cell in enumerate(notebook.cells) if "server = serve(" in cell.source)
    notebook.cells = [*notebook.cells[: started + 1], nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    with pytest.raises(pm.PapermillExecutionError, match="ZeroDivisionError"):
        pm.execute_notebook(
            tmp_path / "failing.ipynb", tmp_path / "out.ipynb", {"train_images": 500, "epochs": 1}, progress_bar=False
        )
    assert "/health: 200" in (tmp_path / "out.ipynb").read_text()
    wait_until(lambda: not scoring_servers(home), seconds=20)
