"""Nested Optuna studies in MLflow: one parent run a study, one child run a trial, any number of workers.

`tune` opens the study and its parent run, does trials until there are enough, and records the winner. Each trial is one
`run_trial`: a child run in MLflow. `do_trials` of the same study may go on elsewhere at the same time.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, TuneConfig
from demo_lib.data import FashionData, batches, load_data
from demo_lib.model import build_model
from demo_lib.store import connect
from demo_lib.study import (
    MEMORY,
    close_uncounted,
    done,
    give_up_dead,
    is_stopped,
    open_study,
    parent_run,
    running,
    stop,
    study_figures,
)
from demo_lib.tracking import log_model, provenance, truthful_status
from demo_lib.training import evaluate, fit

import mlflow
import optuna
import torch
from mlflow.entities import Run
from optuna.trial import TrialState
from tqdm import tqdm

Work = Callable[[optuna.Study, TuneConfig, FashionData], Generator[None]]  # does trials, and yields now and then


class _Surplus(Exception):
    """Another worker took the study's last trial in the same moment."""


class Stopped(KeyboardInterrupt):
    """Whoever began the study has interrupted it: a worker's trial ends as by Ctrl-C."""


def suggest(trial: optuna.Trial, config: TuneConfig) -> TrainConfig:
    """Draw the trial's hyperparameters, the learning rate on a log scale."""
    return config.train_config(
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        channels=trial.suggest_int("channels", 4, config.max_channels, step=4),
        dropout=trial.suggest_float("dropout", 0.0, 0.5),
    )


def tune(config: TuneConfig, experiment: str = "tune", storage: str | None = None, work: Work | None = None) -> Run:
    """Run the study up to `config.trials` trials in one parent run, and return that run.

    `storage` is as in `open_study`: a study of that name in it goes on in the same parent run. `work` does the trials,
    by default `do_trials`: here, one at a time. Trials whose process died are tried again. The winner, chosen on the
    validation split, is scored once on the test split. A storage of MLflow's, a parent run that is gone, several
    workers without `work`, and a study without a completed trial are a DemoError.
    """
    if config.workers != 1 and work is None:
        raise DemoError(f"workers = {config.workers} are processes: call `tune` of demo_lib.ops.workers, or keep 1.")
    connect(experiment)
    study = open_study(config, storage)
    data = load_data(config.train_config())
    try:
        with parent_run(study, config, provenance(data)) as parent, truthful_status():
            _see_to_trials(study, config, data, work or do_trials)
            _conclude(study, config, data)
    except KeyboardInterrupt:
        if storage != MEMORY:
            stop(study)
            print(f"interrupted: the same command or call goes on with study {config.study!r} from here.")
        raise
    return mlflow.get_run(parent.info.run_id)


def do_trials(study: optuna.Study, config: TuneConfig, data: FashionData) -> Generator[None]:
    """Do trials until `config.trials` are done, here or elsewhere; yield now and then.

    It stays while others do the last ones: one of these may die, and its trial is to be tried again.
    """

    def objective(trial: optuna.Trial) -> float:
        if sum(each.number < trial.number for each in done(study) + running(study)) >= config.trials:
            raise _Surplus
        return run_trial(trial, config, data, study.user_attrs["parent_run_id"])

    while len(done(study)) < config.trials:
        if is_stopped(study):
            raise Stopped
        if len(done(study) + running(study)) < config.trials:
            try:
                study.optimize(objective, n_trials=1, catch=Exception)
            except UnboundLocalError as error:  # what Optuna makes of an interrupt while it records a trial
                raise (error.__context__ or error) from None
        else:
            time.sleep(0.3)
            give_up_dead(study)
        yield


def run_trial(trial: optuna.Trial, config: TuneConfig, data: FashionData, parent_run_id: str) -> float:
    """Train one trial as a child run of the parent and return its best validation accuracy.

    The child ends FINISHED, KILLED (pruned or interrupted) or FAILED, with Optuna's state in the tag `trial_state`; the
    weights of its best epoch are its artifact `weights.pt`. If the pruner gives it up, it raises `TrialPruned`.
    """
    number = str(trial.number)
    try:
        train = suggest(trial, config)
        tags = provenance(data, train) | {"study": config.study, "trial_number": number, "trial_state": "FAIL"}
        trial.set_user_attr("process", tags["process"])
        # parent_run_id as well as nested: in another process there is no active parent to nest in.
        child = mlflow.start_run(run_name=f"trial {number}", nested=True, parent_run_id=parent_run_id, tags=tags)
        with child, truthful_status():
            trial.set_user_attr("run_id", child.info.run_id)
            mlflow.log_params(train.model_dump())
            value = _fit_trial(trial, train, data)
            mlflow.set_tag("trial_state", "PRUNED" if value is None else "COMPLETE")
            if value is None:
                mlflow.end_run("KILLED")  # raised inside the block, TrialPruned would end the run FAILED
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # as in `truthful_status`: Optuna writes before it passes it on
        if isinstance(error, Exception):
            trial.set_user_attr("error", repr(error))
        raise
    if value is None:
        raise optuna.TrialPruned
    return value


def _fit_trial(trial: optuna.Trial, train: TrainConfig, data: FashionData) -> float | None:
    """Fit the trial's network in the active run; None if it was pruned."""
    weights, best = {}, 0.0
    for record in fit(build_model(train), data, train):
        mlflow.log_metrics(record.metrics, step=record.step)
        if record.weights:
            weights, best = record.weights, record.metrics["val_accuracy"]
        if "val_accuracy" in record.metrics:
            if is_stopped(trial.study):
                raise Stopped
            trial.report(record.metrics["val_accuracy"], record.epoch)
            if record.epoch < train.epochs and trial.should_prune():
                return None
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder) / "weights.pt")
        mlflow.log_artifact(str(Path(folder) / "weights.pt"))
    return best


def _see_to_trials(study: optuna.Study, config: TuneConfig, data: FashionData, work: Work) -> None:
    """Let trials be done, and wait for those that others do, until there are enough; show how many there are."""
    shown = sys.stdout.isatty() or "ipykernel" in sys.modules  # as text: a widget is lost where it is executed headless
    count = len(done(study))
    with tqdm(total=config.trials, initial=count, unit="trial", file=sys.stdout, ncols=80, disable=not shown) as bar:
        while (before := count) < config.trials:
            give_up_dead(study)
            with closing(work(study, config, data)) as working:
                for _ in working:
                    give_up_dead(study)
                    bar.update(len(done(study)) - bar.n)
            count = len(done(study))
            if count == before and not running(study):
                raise DemoError("no worker finished a trial: run with one worker to see why.")
            time.sleep(0.1)


def _conclude(study: optuna.Study, config: TuneConfig, data: FashionData) -> None:
    """Record the winner and the study's plots on the parent run; if the winner is new, test it and log its model."""
    close_uncounted(study)
    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        raise DemoError("no trial was completed: the child runs have the errors.")
    run_id = (best := study.best_trial).user_attrs["run_id"]
    mlflow.log_metric("best_val_accuracy", best.value, step=best.number)
    for name, figure in study_figures(study).items():
        mlflow.log_figure(figure, f"study/{name}.png")
    tags = mlflow.get_run(mlflow.active_run().info.run_id).data.tags
    if "error" in tags:
        mlflow.delete_tag("error")  # of a call that was interrupted
    if tags.get("best_run_id") == run_id:
        return
    model = build_model(config.train_config(**best.params))
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="weights.pt")
    model.load_state_dict(torch.load(path, weights_only=True))
    log_model(model, "best_model", next(batches(data.test, 2))[0])
    mlflow.log_metrics({f"test_{name}": value for name, value in evaluate(model, data.test).items()}, step=best.number)
    # Tags, as parameters can't change and a resumed study may find a better trial. Last: they say that all is recorded.
    found = {f"best_{name}": value for name, value in best.params.items()}
    mlflow.set_tags(found | {"best_run_id": run_id, "best_trial": best.number})
