"""What each lesson leaves in the store and the registry, asserted."""

import os

from demo_lib.config import TrainConfig
from demo_lib.store import own_model_name, own_name

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from tests.tools.processes import scoring_servers, team_servers


def check_lesson(name, params):
    """Check what the lesson left in the store that it was run in once, with these parameters."""
    globals()[f"check_lesson_{name[:2]}"](params)


def runs_of(experiment):
    """Return the experiment's runs, the newest first; on a server with a login, of your own experiment."""
    return mlflow.search_runs(experiment_names=[own_name(experiment)], output_format="list")


def families(experiment):
    """Return {parent's name: (parent, its children)} of an experiment, and the names of runs with no family."""
    found = runs_of(experiment)
    top = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    of = {run.info.run_id: [] for run in top}
    for run in found:
        if parent := run.data.tags.get("mlflow.parentRunId"):
            of[parent].append(run)
    return {run.info.run_name: (run, of[run.info.run_id]) for run in top}


def load_table(run, name):
    return pd.read_parquet(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name))


def check_lesson_00(params):
    found = runs_of("00_start_here")
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]
    left_open, run = found
    assert run.info.run_name == f"{params['train_images']} images" and not left_open.data.params
    assert int(run.data.params["train_images"]) == params["train_images"]
    assert 60 < run.data.metrics["mean_pixel"] < 85


def check_lesson_01(params):
    client = MlflowClient()
    runs = {run.info.run_name: run for run in runs_of("01_track_a_run")}
    name = f"rate {params['learning_rate']:g}"
    assert set(runs) == {name, "doomed"}
    run, doomed = runs[name], runs["doomed"]
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
    assert {run.data.tags["trial_state"] for run in trials} <= {"COMPLETE", "PRUNED"}
    assert resumed.info.status == "FINISHED" and len(trials) == 3
    assert not [run for _, (top, below) in tree.items() for run in (top, *below) if run.info.status == "RUNNING"]


def check_lesson_03(params):
    tree = families("03_query_and_plot_runs")
    parent, children = tree[params["study"]]
    assert parent.info.status == "FINISHED" and len(children) == params["trials"]
    best = max(children, key=lambda run: run.data.metrics["val_accuracy"])
    files = {run.info.run_id: MlflowClient().list_artifacts(run.info.run_id) for run in children}
    plotted = [run for run in children if "loss_curve.png" in {file.path for file in files[run.info.run_id]}]
    assert len(plotted) == 1
    assert plotted[0].data.metrics["val_accuracy"] == best.data.metrics["val_accuracy"]
    (again,) = [run for run, _ in tree.values() if "repeats" in run.data.tags]
    assert again.data.tags["repeats"] == plotted[0].info.run_id
    assert TrainConfig.from_params(again.data.params) == TrainConfig.from_params(plotted[0].data.params)
    client = MlflowClient()
    for metric in ("train_loss", "val_loss"):
        first, second = (
            [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
            for run in (plotted[0], again)
        )
        assert first == second


def check_lesson_04(params):
    tree = families("04_package_a_model")
    run, classifier = tree["checkpoints"][0], tree["classifier"][0]
    assert run.info.status == classifier.info.status == "FINISHED"
    assert not MlflowClient().list_artifacts(run.info.run_id)
    found = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    models = {model.name: model for model in found}
    epochs = [f"epoch-{epoch}" for epoch in range(1, params["epochs"] + 1)]
    assert set(models) == {*epochs, "classifier"}
    assert {model.status for model in found} == {"READY"}
    for name in epochs:
        assert {metric.key for metric in models[name].metrics} == {"val_loss", "val_accuracy"}
        assert {metric.dataset_name for metric in models[name].metrics} == {"validation"}
    accuracy = {name: {each.key: each.value for each in models[name].metrics}["val_accuracy"] for name in epochs}
    best = mlflow.get_logged_model(mlflow.models.get_model_info(models["classifier"].model_uri).metadata["network"])
    assert accuracy[best.name] == max(accuracy.values())
    check_evaluation(models["classifier"], best, params, classifier)


def check_evaluation(classifier, network, params, run):
    """The classifier is as often right as was logged, and gives the labels of the network inside it."""
    from demo_lib.data import CLASSES, load_data
    from demo_lib.deploy.packaging import raw_images

    known = {name: value for name, value in params.items() if name in TrainConfig.model_fields}
    test = load_data(TrainConfig(**known)).test
    labels = mlflow.pyfunc.load_model(classifier.model_uri).predict(raw_images(test))["label"]
    right = sum(label == CLASSES[truth] for label, truth in zip(labels, test.labels, strict=True))
    assert right / len(test) == pytest.approx(run.data.metrics["accuracy_score"], abs=1e-6)
    with torch.inference_mode():
        logits = mlflow.pytorch.load_model(network.model_uri)(test.images[:100] / 255)
    assert [CLASSES[best] for best in logits.argmax(1)] == list(labels[:100])
    assert {metric.key for metric in classifier.metrics} >= {"accuracy_score"}
    files = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert files == {"per_class_metrics.csv", "confusion_matrix.png"}


def check_lesson_05(params):
    from demo_lib.data import CLASSES, load_data
    from demo_lib.deploy.packaging import raw_images

    client, name = MlflowClient(), own_model_name(params["model_name"])
    runs = runs_of("05_register_and_promote")
    assert {run.info.status for run in runs} == {"FINISHED"}
    made = {(int(run.data.params["epochs"]), int(run.data.params["train_images"])): run.info.run_id for run in runs}
    size, epochs = params["train_images"], params["epochs"]
    assert len(runs) == 3 and made.keys() == {(1, size), (epochs, size), (epochs, size // 5)}
    champion, former = (client.get_model_version_by_alias(name, alias) for alias in ("champion", "previous"))
    assert (champion.run_id, former.run_id) == (made[epochs, size], made[1, size])
    assert set(client.get_registered_model(name).aliases) == {"champion", "previous"}
    alive = client.search_model_versions(f"name = '{name}'")
    assert {version.run_id for version in alive} == {champion.run_id, former.run_id}
    assert champion.description == f"epochs: {epochs}, images: {size:,}"
    tags = champion.tags
    assert (tags["decision"], tags["champion_version"], tags["purpose"]) == ("promoted", str(former.version), "lesson")
    assert "rolled_back" not in tags
    assert float(tags["accuracy"]) >= float(tags["champion_accuracy"]) + params["min_gain"]
    gate = load_data().gate
    labels = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(raw_images(gate))["label"]
    assert float(tags["accuracy"]) == (labels == [CLASSES[label] for label in gate.labels]).mean()
    assert int(tags["images"]) == len(gate)
    deleted = [
        model
        for model in mlflow.search_logged_models([runs[0].info.experiment_id], output_format="list")
        if model.source_run_id == made[epochs, size // 5] and model.name == "classifier"
    ]
    assert [model.status for model in deleted] == ["READY"]


def check_lesson_06(params):
    client, name = MlflowClient(), own_model_name(params["model_name"])
    champion = client.get_model_version_by_alias(name, "champion")
    found = runs_of("06_serve_a_model")
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
    medians = timings.set_index("images in a call")
    assert list(medians) == ["HTTP", "pyfunc", "network"] and list(medians.index) == [1, 32, 256]
    assert (medians > 0).all(axis=None) and (medians.loc[256] > medians.loc[1]).all()
    traces = mlflow.search_traces(
        locations=[offline.info.experiment_id], run_id=runs["traced"].info.run_id, return_type="list"
    )
    assert len(traces) == params["traced_calls"] + 1
    assert {trace.info.trace_metadata["mlflow.modelId"] for trace in traces} == {model.model_id}
    assert {tuple(span.name for span in trace.data.spans) for trace in traces} == {
        ("classify", "scale", "network", "label"),
        ("classifier",),
    }
    assert max(len(trace.to_json()) for trace in traces) < 10_000, "a trace holds whole images"
    assert not scoring_servers(os.environ["DEMO_HOME"])


def check_lesson_07(params):
    runs = runs_of("07_run_a_project")
    (changed,), (committed,) = ([run for run in runs if run.info.run_name == name] for name in ("changed", "committed"))
    (again,) = [run for run in runs if "reproduces" in run.data.tags]
    failed = {run.info.run_name: run.data.params for run in runs if run.info.status == "FAILED"}
    assert len(runs) == 5 and failed.keys() == {"epochs = 0", "epoch = 1"}
    assert failed["epochs = 0"]["epochs"] == "0" and failed["epoch = 1"]["epoch"] == "1"
    for run in (changed, committed, again):
        assert run.info.status == "FINISHED"
        assert TrainConfig.from_params(run.data.params).model_copy(update={"device": "auto"}) == TrainConfig(**params)
    for run, dirty in ((changed, "true"), (committed, "false")):
        assert (run.data.tags["mlflow.source.type"], run.data.tags["git_dirty"]) == ("PROJECT", dirty)
    assert committed.data.tags["mlflow.source.git.commit"] == changed.data.tags["mlflow.source.git.commit"]
    assert committed.data.tags["mlflow.source.name"].startswith("file://")
    assert again.data.tags["reproduces"] == committed.info.run_id
    losses = [
        [(point.step, point.value) for point in MlflowClient().get_metric_history(run.info.run_id, "train_loss")]
        for run in (changed, committed, again)
    ]
    assert losses[0] != losses[1] == losses[2]


def check_lesson_08(params):
    (run,) = runs_of("08_share_a_server")
    assert run.info.status == "FINISHED"
    assert TrainConfig.from_params(run.data.params).train_images == params["train_images"]
    said = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/findings.json")
    assert said["steps"] == params["steps"]
    assert said["slowest"] > 1, "the server was never away"
    assert all(said["checks"].values()) and len(said["checks"]) > 4
    assert said["answers"] == {
        "ben/work": {"read": "allowed", "change": 403, "delete": 403},
        "both/work": {"read": "allowed", "change": "allowed", "delete": 403},
    }
    lost = {kind for kind, count in said["moved"].items() if count["arrived"] < count["before"]}
    assert lost == {"run id", "model ids"} and said["moved"]["metric values"]["arrived"] > 4
    assert all(count["arrived"] == count["before"] for count in said["restored"].values())
    assert said["restored"]["files"]["arrived"] >= 1 and said["restored"]["model ids"]["arrived"] == 2
    assert not team_servers(os.environ["DEMO_HOME"])


def check_lesson_10(params):
    tree = families("10_scale_out")
    studies = {name.rpartition(" ")[0]: family for name, family in tree.items() if "study" in family[0].data.tags}
    assert set(studies) == {"one process", "workers", "Dask"}
    for parent, children in studies.values():
        finished = [run for run in children if run.info.status == "FINISHED"]
        assert parent.info.status == "FINISHED" and len(finished) == params["trials"]
    processes = {way: {run.data.tags["process"] for run in children} for way, (_, children) in studies.items()}
    assert processes["one process"] == {studies["one process"][0].data.tags["process"]}
    assert len(processes["workers"]) > 1 and studies["workers"][0].data.tags["process"] not in processes["workers"]
    (killed,) = [run for run in studies["Dask"][1] if run.info.status != "FINISHED"]
    assert (killed.info.status, killed.data.tags["trial_state"]) == ("KILLED", "FAIL")
    again = [run for run in studies["Dask"][1] if run.data.params == killed.data.params]
    assert sorted(run.info.status for run in again) == ["FINISHED", "KILLED"]
    measured = mlflow.artifacts.load_dict(f"{tree['three ways'][0].info.artifact_uri}/ways.json")
    assert [row[0] for row in measured["data"]] == ["one process", "workers", "Dask"]
    (batch,) = runs_of_batches(3)
    assert batch.info.status == "FINISHED"
    jobs = {name: family[0] for name, family in tree.items() if name.startswith("means of ")}
    assert {run.data.tags["batch_id"] for run in jobs.values()} == {batch.info.run_id}
    assert jobs["means of 2000 images"].data.metrics["val_accuracy"] > 0.6


def runs_of_batches(jobs):
    """Return the parents of batches of so many jobs, each of which has a child for each job, finished."""
    found = [family for family in families("batch").values() if family[0].data.params["jobs"] == str(jobs)]
    assert all([run.info.status for run in children] == ["FINISHED"] * jobs for _, children in found)
    return [parent for parent, _ in found]
