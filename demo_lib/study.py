"""An Optuna study that lasts: its storage, its parent run in MLflow, and what dead workers leave of it."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from demo_lib.config import DemoError, TuneConfig, settings, sqlite_file, sqlite_uri, tracking_uri, without_login
from demo_lib.databases import refuse_mlflow
from demo_lib.identity import lives
from demo_lib.store import kill_run
from demo_lib.tracking import log_config

import mlflow
import optuna
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT, GRACE = 3, 15  # seconds between two signs of life of a trial, and of silence until it counts as dead
MEMORY = "memory"  # the storage of a study that nobody resumes
CHANGEABLE = {"trials", "workers"}  # when a study goes on


def open_study(config: TuneConfig, storage: str | None = None) -> optuna.Study:
    """Create the study or load it by its name.

    `storage` is a database address of Optuna's, by default the SQLite file `store/optuna.db`; with "memory" nothing
    lasts. MLflow's own database, one that can't be opened, and a study that others made are a DemoError.
    """
    opened = None if storage == MEMORY else open_storage(storage)
    study = optuna.create_study(storage=opened, study_name=config.study, direction="maximize", load_if_exists=True)
    foreign = study.trials or study.direction != StudyDirection.MAXIMIZE
    if foreign and "config" not in study.user_attrs:
        raise DemoError(f"the study {config.study!r} in this storage was not made here: give yours another name.")
    equip(study, config, alone=config.workers == 1)
    return study


def equip(study: optuna.Study, config: TuneConfig, alone: bool) -> None:
    """Give the study its pruner and sampler, which no storage keeps; `alone` if this process does all trials."""
    study.pruner = optuna.pruners.NopPruner()
    if config.prune:  # the first epochs of a one-cycle schedule say little
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(2, config.epochs // 3))
    # Five trials at random, then TPE learns: Optuna's ten would be all of a short study. The same seed again would draw
    # the same trials again.
    seed = config.seed + len(study.trials) if alone else None
    study.sampler = TPESampler(n_startup_trials=5, multivariate=True, constant_liar=not alone, seed=seed)


def storage_address(address: str | None = None) -> str:
    """Return the whole address of the studies' storage, by default that of a SQLite file."""
    address = address or settings().storage or sqlite_uri(settings().home / "store" / "optuna.db")
    return sqlite_uri(database) if (database := sqlite_file(address)) else address


def open_storage(address: str | None = None) -> RDBStorage:
    """Open the storage of studies at the address, by default a SQLite file; errors are those of `open_study`."""
    address = storage_address(address)
    if not (database := sqlite_file(address)) and address.startswith("sqlite"):
        raise DemoError(f"{address} lasts no longer than its process: name a file, or give {MEMORY!r}.")
    refuse_mlflow(address)
    try:
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        # Processes that open a new SQLite file together break each other's first tables.
        with FileLock(database.with_name(f".{database.name}.lock"), timeout=60) if database else nullcontext():
            return RDBStorage(
                address, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=_give_up
            )
    except Exception as error:
        what = f"the study storage {without_login(address)} can't be opened ({without_login(str(error))})"
        raise DemoError(f"{what}: give a database address.") from None


@contextmanager
def parent_run(study: optuna.Study, config: TuneConfig, tags: dict[str, str]) -> Iterator[Run]:
    """Open the study's parent run again, or a new one; one begun with another configuration is a DemoError."""
    fixed, saved = config.model_dump(exclude=CHANGEABLE), study.user_attrs.get("config", {})
    if changed := [name for name in fixed if saved.get(name, fixed[name]) != fixed[name]]:
        what = f"study {config.study!r} was begun with {changed[0]} = {saved[changed[0]]}, not {fixed[changed[0]]}"
        raise DemoError(f"{what}: keep it, or give the study another name.")
    if parent_run_id := study.user_attrs.get("parent_run_id"):
        return_to(parent_run_id)
    tags = tags | {"study": config.study, "workers": str(config.workers), "trials": str(config.trials)}
    with mlflow.start_run(run_id=parent_run_id, run_name=config.study, tags=tags) as parent:
        if not parent_run_id:
            log_config(config, exclude=CHANGEABLE)
            study.set_user_attr("parent_run_id", parent.info.run_id)
        study.set_user_attr("config", config.model_dump())
        study.set_user_attr("stopped", False)
        yield parent


def return_to(parent_run_id: str) -> None:
    """Make the experiment of the study's parent run the active one again; a run that is gone is a DemoError.

    The id of a run that `mlflow run` opened leaves the environment: else `mlflow.start_run` would go on in that run.
    """
    client = MlflowClient()
    try:
        parent = client.get_run(parent_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        parent = None
    if parent is None or parent.info.lifecycle_stage == "deleted":
        what = f"the study's parent run is deleted, or not in the store {without_login(tracking_uri())}"
        todo = f"set MLFLOW_TRACKING_URI and `mlflow runs restore --run-id {parent_run_id}`, or take another name"
        raise DemoError(f"{what}: {todo}.")
    os.environ.pop("MLFLOW_RUN_ID", None)
    mlflow.set_experiment(experiment_id=parent.info.experiment_id)


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that run, here or elsewhere, or whose process died."""
    return study.get_trials(deepcopy=False, states=[TrialState.RUNNING])


def done(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that need not be tried again: completed, pruned, or failed by an error of their own."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return [each for each in study.get_trials(deepcopy=False) if each.state in ended or "error" in each.user_attrs]


def is_stopped(study: optuna.Study) -> bool:
    """Whether the study was stopped by `stop` and does not go on yet."""
    return study.user_attrs.get("stopped", False)


def stop(study: optuna.Study, seconds: float = 30) -> None:
    """Stop the study's workers, wherever they are, and wait for them: each looks once an epoch whether to go on."""
    study.set_user_attr("stopped", True)
    deadline = time.monotonic() + seconds
    if running(study):
        print("waiting for the trials of other workers to end; Ctrl-C again does not wait.")
    while running(study) and time.monotonic() < deadline:
        give_up_dead(study)
        time.sleep(0.2)


def close_uncounted(study: optuna.Study) -> None:
    """End as KILLED the finished child runs whose trials are not: a worker died after the one, before the other."""
    counted = {
        trial.user_attrs.get("run_id") for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    }
    parent = mlflow.active_run().info
    where = f"tags.mlflow.parentRunId = '{parent.run_id}' AND attributes.status = 'FINISHED'"
    for run in mlflow.search_runs([parent.experiment_id], where, output_format="list"):
        if run.info.run_id not in counted:
            kill_run(run.info.run_id)


def give_up_dead(study: optuna.Study) -> None:
    """Give up the trials whose process died: here at once, elsewhere after `GRACE` seconds without a sign of life."""
    for trial in running(study):
        if lives(trial.user_attrs.get("process", "")) is False:
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, RuntimeError):  # another process was faster
                continue
            _give_up(study, trial)
    optuna.storages.fail_stale_trials(study)


def _give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    """Close the child run of a trial whose process died, and queue its hyperparameters again."""
    parent = MlflowClient().get_run(study.user_attrs["parent_run_id"]).info
    # By its tags: the process may have died before the trial knew its run.
    nested = f"tags.mlflow.parentRunId = '{parent.run_id}' AND tags.trial_number = '{trial.number}'"
    where = f"{nested} AND attributes.status = 'RUNNING'"
    for run in mlflow.search_runs([parent.experiment_id], where, output_format="list"):
        kill_run(run.info.run_id)
    study.enqueue_trial(trial.params)


def study_figures(study: optuna.Study) -> dict[str, "Figure"]:
    """Return Optuna's plots of the study by name, closed: a notebook shows the one that a cell ends with."""
    import matplotlib.pyplot as plt  # late: workers draw nothing
    from matplotlib.ticker import MaxNLocator

    names = ["optimization_history", "intermediate_values", "parallel_coordinate"]
    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) >= 4:  # fewer say nothing of importance
        names.append("param_importances")
    plt.close(plt.figure())  # a kernel's first figure sets rcParams for showing figures, which rc_context would undo
    # Optuna changes matplotlib's style for all later figures, and warns that its plots are experimental.
    with plt.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings(action="ignore"):
        figures = {name: getattr(optuna.visualization.matplotlib, f"plot_{name}")(study).figure for name in names}
    for figure in figures.values():
        plt.close(figure)
    for name in names[:2]:  # trials and epochs are whole numbers
        figures[name].axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend = figures["intermediate_values"].axes[0].get_legend()
    if legend and len(study.trials) > 12:  # it would leave the figure, with colours that can't be told apart
        legend.remove()
    return figures
