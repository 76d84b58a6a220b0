"""Nested Optuna studies in MLflow: one parent run a study, one child run a trial; parallel and resumable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, TuneConfig, settings, sqlite_file, sqlite_uri, tracking_uri
from demo_lib.data import FashionData, batches, load_data
from demo_lib.model import build_model
from demo_lib.plots import parallel_coordinates
from demo_lib.tracking import (
    batched_metrics,
    connect,
    died_here,
    log_config,
    log_model,
    provenance,
    signals_between_queries,
    truthful_status,
)
from demo_lib.training import evaluate, fit

import matplotlib.pyplot as plt
import mlflow
import optuna
import pandas as pd
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT, GRACE = 3, 15  # seconds between two signs of life of a trial, and of silence until it counts as dead
FAILED = 3  # exit code of a worker whose trial failed
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
CHANGEABLE = {"trials", "workers", "stop_on_error"}  # when a study goes on


class TuneError(DemoError):
    """A study can't be opened, is in use, or came to nothing."""


@dataclass(frozen=True)
class _Workers:
    """What a worker needs to find the study and the parent run."""

    experiment: str
    storage: str | None
    parent_run_id: str

    @property
    def lasting(self) -> bool:
        return self.storage != "memory"


def suggest(trial: optuna.Trial, config: TuneConfig) -> TrainConfig:
    """Draw the trial's hyperparameters: what the learning rate and the width cost and gain differs by orders."""
    return config.train_config(
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        channels=trial.suggest_int("channels", 4, config.max_channels, step=4),
        dropout=trial.suggest_float("dropout", 0.0, 0.5),
    )


def run_trial(trial: optuna.Trial, config: TuneConfig, data: FashionData, parent_run_id: str) -> float:
    """Train one trial as a child run of the parent and return its best validation accuracy.

    The child ends FINISHED, KILLED (pruned) or FAILED, with Optuna's state in the tag `trial_state`; the weights of
    its best epoch are its artifact `weights.pt`.

    Raises:
        optuna.TrialPruned: the pruner gave the trial up.
    """
    train = suggest(trial, config)
    try:
        value = _run_child(trial, config.study, train, data, parent_run_id)
    except BaseException as error:
        # Optuna counts an interrupted trial as failed, even where its run had got as far as its last line.
        if run_id := trial.user_attrs.get("run_id"):
            MlflowClient().set_tag(run_id, "trial_state", "FAIL")
        if isinstance(error, Exception):
            trial.set_user_attr("error", repr(error))
        raise
    if value is None:
        raise optuna.TrialPruned
    return value


def _run_child(
    trial: optuna.Trial, study: str, train: TrainConfig, data: FashionData, parent_run_id: str
) -> float | None:
    """Train in a child run and return the best validation accuracy, None if the trial was pruned."""
    tags = provenance(data, train) | {"study": study, "trial_number": str(trial.number), "trial_state": "FAIL"}
    # parent_run_id as well as nested: in another thread or process there is no active parent to nest in.
    with (
        mlflow.start_run(run_name=f"trial {trial.number}", nested=True, parent_run_id=parent_run_id, tags=tags) as run,
        truthful_status(),
    ):
        trial.set_user_attr("run_id", run.info.run_id)
        mlflow.log_params(train.model_dump())
        value = _fit_trial(trial, train, data)
        mlflow.set_tag("trial_state", "PRUNED" if value is None else "COMPLETE")
        if value is None:
            mlflow.end_run("KILLED")  # raised inside the block, TrialPruned would end the run FAILED
    return value


def _fit_trial(trial: optuna.Trial, train: TrainConfig, data: FashionData) -> float | None:
    """Fit the trial's network in the active run; None if it was pruned."""
    weights, best = {}, 0.0
    with batched_metrics() as log_metrics:
        for record in fit(build_model(train), data, train):
            log_metrics(record.metrics, step=record.step)
            if "val_accuracy" not in record.metrics:
                continue
            if record.weights:
                weights, best = record.weights, record.metrics["val_accuracy"]
            trial.report(record.metrics["val_accuracy"], record.epoch)
            if record.epoch < train.epochs and trial.should_prune():
                return None
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder) / "weights.pt")
        mlflow.log_artifact(str(Path(folder) / "weights.pt"))
    return best


def tune(config: TuneConfig, experiment: str = "tune", storage: str | None = None) -> Run:
    """Run the study up to `config.trials` trials in one parent run, and return that run.

    `storage` is a database address of Optuna's, by default a SQLite file of its own beside MLflow's store; a study of
    that name in it goes on in the same parent run. With `storage="memory"` nothing lasts and threads do the work of
    processes. Trials whose process died are tried again. The winner, chosen on the validation split, is scored once on
    the test split.

    Raises:
        TuneError: the storage is MLflow's, the study's parent run is gone, another process runs the study, or no trial
            was completed.
    """
    connect(experiment)
    study = open_study(config, storage)
    data = load_data(config.train_config())
    with _parent_run(study, config, data) as parent, _resumable(config, storage), truthful_status():
        found = mlflow.get_experiment(parent.info.experiment_id)
        _optimize(study, config, data, _Workers(found.name, storage, parent.info.run_id))
        _conclude(study, config, data)
    return mlflow.get_run(parent.info.run_id)


def open_study(config: TuneConfig, storage: str | None = None) -> optuna.Study:
    """Create the study or load it by its name; arguments as in `tune`.

    Raises:
        TuneError: the storage is MLflow's own database, or can't be used.
    """
    if storage == "memory":
        opened = None
    else:
        own = settings().home / "store" / "optuna.db"
        own.parent.mkdir(parents=True, exist_ok=True)
        opened = _open_storage(storage or sqlite_uri(own))
    pruner = optuna.pruners.NopPruner()
    if config.prune:  # the first epochs of a one-cycle schedule say little
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(2, config.epochs // 3))
    study = optuna.create_study(
        storage=opened, study_name=config.study, direction="maximize", pruner=pruner, load_if_exists=True
    )
    study.sampler = _sampler(study, config)
    return study


def study_figures(study: optuna.Study) -> dict[str, Figure]:
    """Return plots of the study by name: its history, its trials by epoch, its hyperparameters and what they matter.

    The study has a completed trial at least; with fewer than four, the plot of the importances is left out. The figures
    are closed: a notebook shows the one that a cell ends with.
    """
    draw = optuna.visualization.matplotlib
    plots = {
        "optimization_history": draw.plot_optimization_history,
        "intermediate_values": draw.plot_intermediate_values,
    }
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(completed) >= 4:
        plots["param_importances"] = draw.plot_param_importances
    plt.close(plt.figure())  # the first figure makes a notebook show figures; made in rc_context, that would be undone
    # Optuna changes matplotlib's style for all later figures.
    with plt.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the plots are experimental, and that an axis has one value only
        figures = {name: plot(study).figure for name, plot in plots.items()}
    for name in ("optimization_history", "intermediate_values"):  # trials and epochs are whole numbers
        figures[name].axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend = figures["intermediate_values"].axes[0].get_legend()
    if legend and len(study.trials) > 12:  # it would leave the figure, with colours that can't be told apart
        legend.remove()
    rows = [{"params": trial.params, "metrics": {"val_accuracy": trial.value}} for trial in completed]
    ranges = study.best_trial.distributions
    log = [name for name, values in ranges.items() if getattr(values, "log", False)]
    figures["parallel_coordinates"] = parallel_coordinates(pd.json_normalize(rows), [*ranges], "val_accuracy", log)
    for figure in figures.values():
        plt.close(figure)
    return figures


def _sampler(study: optuna.Study, config: TuneConfig, worker: int = 0) -> optuna.samplers.TPESampler:
    """Return a sampler that draws five trials at random and then learns; Optuna's ten would be all of a short study."""
    return optuna.samplers.TPESampler(
        n_startup_trials=5,
        multivariate=True,
        constant_liar=worker > 0,
        seed=config.seed + len(study.trials) + 1000 * worker,  # the same seed again would draw the same trials again
    )


def _open_storage(address: str) -> RDBStorage:
    database, of_mlflow = sqlite_file(address), sqlite_file(tracking_uri())
    if address == tracking_uri() or (database and of_mlflow and database.resolve() == of_mlflow.resolve()):
        raise TuneError(f"{address} is MLflow's database: give Optuna one of its own.")
    lock = nullcontext() if database is None else FileLock(database.with_name(f".{database.name}.lock"))
    try:
        with lock:  # processes that open a new SQLite file together break each other's first tables
            return RDBStorage(
                address, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=_give_up
            )
    except Exception as error:
        raise TuneError(f"the study storage {address} can't be opened ({error}): give a database address.") from None


def _give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    """Close the child run of a trial whose process died, and queue the trial again."""
    if run_id := trial.user_attrs.get("run_id"):
        client = MlflowClient()
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_tag(run_id, "error", "its process ended without closing the run")
            client.set_terminated(run_id, "KILLED")
    RetryHeartbeatStaleTrialCallback()(study, trial)


@contextmanager
def _parent_run(study: optuna.Study, config: TuneConfig, data: FashionData) -> Iterator[Run]:
    """Open the study's parent run again, or a new one."""
    fixed = config.model_dump(exclude=CHANGEABLE)
    begun = study.user_attrs.get("config", fixed)
    if changed := [name for name in fixed if begun.get(name) != fixed[name]]:
        raise TuneError(
            f"study {config.study!r} was begun with {changed[0]} = {begun.get(changed[0])}, not {fixed[changed[0]]}: "
            "keep it, or give the study another name."
        )
    begun_in = study.user_attrs.get("parent_run_id")
    if begun_in:
        _return_to(begun_in)
    tags = provenance(data) | {"study": config.study, "workers": str(config.workers), "trials": str(config.trials)}
    with mlflow.start_run(run_id=begun_in, run_name=config.study, tags=tags) as parent:
        if not begun_in:
            log_config(config, exclude=CHANGEABLE)
            study.set_user_attr("config", fixed)
            study.set_user_attr("parent_run_id", parent.info.run_id)
        yield parent


def _return_to(parent_run_id: str) -> None:
    """Make the experiment of the study's parent run the active one again.

    A run that `mlflow run` has opened meanwhile only points there: the first trial would take it for its own.
    """
    try:
        parent = mlflow.get_run(parent_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TuneError(
            f"the study's parent run {parent_run_id} is not in this store: set MLFLOW_TRACKING_URI to the store that "
            "has it, or give the study another name."
        ) from None
    if parent.info.lifecycle_stage == "deleted":
        raise TuneError(
            f"the study's parent run {parent_run_id} is deleted: bring it back with `mlflow runs restore --run-id "
            f"{parent_run_id}`, or give the study another name."
        )
    if opened := os.environ.pop("MLFLOW_RUN_ID", None):
        MlflowClient().set_tag(opened, "continues", parent_run_id)
    mlflow.set_experiment(experiment_id=parent.info.experiment_id)


@contextmanager
def _resumable(config: TuneConfig, storage: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if storage != "memory":
            print(f"interrupted: the same command or call goes on with study {config.study!r} from here.")
        raise


def remaining(study: optuna.Study, config: TuneConfig) -> int:
    """Return how many trials are still to do: pruned ones and those that failed by an error count as done."""
    trials = study.get_trials(deepcopy=False)
    return config.trials - sum(trial.state in DONE or "error" in trial.user_attrs for trial in trials)


def _optimize(study: optuna.Study, config: TuneConfig, data: FashionData, workers: _Workers) -> None:
    """Run rounds until the study has its trials; a round falls short when a worker dies."""
    total = config.trials
    # In a notebook too, as text: a widget is lost where the executed notebook is looked at.
    shown = sys.stdout.isatty() or "ipykernel" in sys.modules
    done = total - remaining(study, config)
    with tqdm(total=total, initial=done, unit="trial", file=sys.stdout, ncols=80, disable=not shown) as bar:
        while (left := remaining(study, config)) > 0:
            if workers.lasting:
                _settle_running_trials(study)
            if workers.lasting and config.workers > 1:
                _run_processes(study, config, workers, left, bar)
            else:
                _run_threads(study, config, data, workers, left, bar)
            if remaining(study, config) == left:
                raise TuneError("no worker finished a trial: run with one worker to see why.")


def _run_threads(study, config, data, workers, count, bar) -> None:
    threads = torch.get_num_threads()
    jobs = 1 if workers.lasting else config.workers
    torch.set_num_threads(max(1, threads // jobs))
    try:
        study.optimize(
            lambda trial: run_trial(trial, config, data, workers.parent_run_id),
            n_trials=count,
            n_jobs=jobs,
            catch=() if config.stop_on_error else Exception,
            callbacks=[lambda study, trial: _show(study, config, bar)],
        )
    finally:
        torch.set_num_threads(threads)


def _run_processes(study, config, workers, count, bar) -> None:
    """Share the trials out among new processes, each with its share of the cores, and wait for them."""
    context = multiprocessing.get_context("spawn")
    shares = [count // config.workers + (index < count % config.workers) for index in range(config.workers)]
    with _environment(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // config.workers))):
        processes = [
            context.Process(target=_work, args=(config, workers, share, index, os.getpid()), daemon=True)
            for index, share in enumerate(shares)
            if share
        ]
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(0.3)
            _show(study, config, bar)
            if config.stop_on_error and any(process.exitcode == FAILED for process in processes):
                raise TuneError("a trial failed, and stop_on_error is set: its child run has the error.")
    finally:
        _stop(processes)


def _work(config: TuneConfig, workers: _Workers, count: int, index: int, coordinator: int) -> None:
    """Be one worker process: run `count` trials of the study, stop when the coordinator is gone."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the coordinator decides
    signal.signal(signal.SIGTERM, interrupt)
    try:
        connect(workers.experiment)
        study = open_study(config, workers.storage)
        study.sampler = _sampler(study, config, worker=index + 1)
        data = load_data(config.train_config())
        # Also between the trials and in `suggest`, outside of the trial's run: the study is a SQLite file, too.
        with signals_between_queries({signal.SIGTERM: KeyboardInterrupt}):
            study.optimize(
                lambda trial: run_trial(trial, config, data, workers.parent_run_id),
                n_trials=count,
                catch=() if config.stop_on_error else Exception,
                callbacks=[lambda study, trial: study.stop() if os.getppid() != coordinator else None],
            )
    except KeyboardInterrupt:
        return
    except Exception:
        if config.stop_on_error:
            sys.exit(FAILED)
        raise


def _stop(processes: list) -> None:
    """Ask the workers to end their trials, and kill those that don't in time."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _show(study: optuna.Study, config: TuneConfig, bar: tqdm) -> None:
    bar.update(config.trials - remaining(study, config) - bar.n)
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]
    if values:
        bar.set_postfix(best=f"{max(values):.4f}")


def _settle_running_trials(study: optuna.Study) -> None:
    """Give up the running trials of dead processes, at once if they died here, else when they are silent too long."""
    patience = time.monotonic() + GRACE + 2 * HEARTBEAT
    while running := study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        for trial in running:
            run_id = trial.user_attrs.get("run_id")
            if run_id and died_here(mlflow.get_run(run_id)):
                study.tell(trial.number, state=TrialState.FAIL)
                _give_up(study, study.trials[trial.number])
        optuna.storages.fail_stale_trials(study)
        if time.monotonic() > patience:
            raise TuneError(f"study {study.study_name!r} is being run by another process: wait for it, or stop it.")
        time.sleep(0.2)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _conclude(study: optuna.Study, config: TuneConfig, data: FashionData) -> None:
    """Record the winner on the parent run, score a new one on the test split, log its model and the study's plots."""
    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        raise TuneError("no trial was completed: the child runs have the errors.")
    best = study.best_trial
    run_id = best.user_attrs["run_id"]
    mlflow.log_metric("best_val_accuracy", best.value, step=best.number)
    for name, figure in study_figures(study).items():
        mlflow.log_figure(figure, f"study/{name}.png")
    if mlflow.get_run(mlflow.active_run().info.run_id).data.tags.get("best_run_id") == run_id:
        return
    # Tags, as parameters can't change and a resumed study may find a better trial.
    mlflow.set_tags(
        {"best_run_id": run_id, "best_trial": best.number} | {f"best_{k}": v for k, v in best.params.items()}
    )
    model = build_model(config.train_config(**best.params))
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="weights.pt")
    model.load_state_dict(torch.load(path, weights_only=True))
    log_model(model, "best_model", next(batches(data.test, 2))[0])
    mlflow.log_metrics({f"test_{name}": value for name, value in evaluate(model, data.test).items()}, step=best.number)
