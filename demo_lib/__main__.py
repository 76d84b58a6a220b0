"""Command line: `python -m demo_lib doctor | train | tune | run | plot | ...`, each with `--help`."""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from demo_lib.config import (
    Config,
    DemoError,
    TrainConfig,
    TuneConfig,
    read_yaml,
    refuse_lost_folder,
    settings,
    sqlite_file,
    tracking_uri,
    without_login,
)
from demo_lib.identity import torchrun_processes
from demo_lib.ops.processes import PYTHON

STORES = ("mlflow", "optuna", "sqlalchemy")  # packages whose errors are the store's, not this code's


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a sign that somebody's run has in its name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        refuse_lost_folder()
        if torchrun_processes() > 1 and given.do is not _train:
            raise DemoError("torchrun is for `train`: start this command without it.")
        return given.do(given) or 0
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        # A full disk, a store that went away: what is wrong stands in the first line, and SQL in the next.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in STORES:
            raise
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
        print(f"error: {without_login(lines[0]) if lines else type(error).__name__}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    """Return the command line; each command's `do` takes the parsed arguments and returns its exit code, None for 0."""
    parser = argparse.ArgumentParser(prog="python -m demo_lib", description="The MLflow demo series.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("run_id", help="the run's id or its first digits")

    def add(do: Callable, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # No abbreviations: `mlflow run -P epoch=1` appends `--epoch 1`, which must not pass for `--epochs 1`.
        name = do.__name__.strip("_")
        command = commands.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
        command.set_defaults(do=do)
        return command

    add(_doctor, "check this machine and say what to fix")
    _add_fields(add(_train, "train one model, tracked in MLflow, or by torchrun with several processes"), TrainConfig)
    tune = add(_tune, "search for hyperparameters: one parent run, one child run a trial")
    tune.add_argument("--storage", metavar="URL", help="Optuna's database (default: store/optuna.db)")
    tune.add_argument("--dask", metavar="ADDRESS", help="let the workers of this Dask scheduler do the trials")
    tune.add_argument("--join", metavar="STUDY", help="do trials of a study that has begun, here or on another machine")
    _add_fields(tune, TuneConfig)
    run = add(_run, "run lessons headless through papermill")
    run.add_argument("lessons", nargs="*", metavar="LESSON", help="number, name or path of a lesson (default: all)")
    run.add_argument("--jobs", type=int, default=0, metavar="N", help="lessons at once (default: one a core)")
    run.add_argument("-f", "--file", type=Path, metavar="FILE", help="YAML file of parameters")
    run.add_argument(
        "-p", "--param", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter"
    )
    run.add_argument("--output", type=Path, metavar="DIR", help="folder for executed notebooks (default: build)")
    run.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="YAML file: a list of sets of parameters, or lists of values for all combinations; each set is one run",
    )
    run.add_argument("--resume", metavar="BATCH_ID", help="go on with a batch that was interrupted or failed")
    run.add_argument("--dask", metavar="ADDRESS", help="let the workers of this Dask scheduler run the lessons")
    run.add_argument("--join", nargs=3, help=argparse.SUPPRESS)  # what such a worker is told
    add(_plot, "draw a run's loss curve and log it to the run", of_run)
    export = add(_export, "write a run's configuration or its metrics to a file", of_run)
    export.add_argument("--to", type=Path, required=True, metavar="FILE", help="FILE.yaml, FILE.csv or FILE.parquet")
    add(_reproduce, "train a run again and compare every metric step by step", of_run)
    pushed = add(_push, "copy a run, its children and their models to another store or server", of_run)
    pushed.add_argument("--to", required=True, metavar="ADDRESS", help="a server's http address, or sqlite:///FILE")
    pushed.add_argument("--experiment", default="", metavar="NAME", help="experiment there (default: the same name)")
    pushed.add_argument("--register", action="store_true", help="register the models' versions there, too")
    tested = add(_check, "judge your attempts at the exercises by what lies in the store")
    tested.add_argument("wanted", nargs="*", metavar="NN[.K]", help="a lesson's exercises, or one (default: all)")
    hunted = add(_hunt, "make a week of runs with hidden faults, for the exercises 03.3 and 09.1")
    hunted.add_argument("--seed", required=True, metavar="N", help="draws the runs and their faults: 0 or more")
    hunted.add_argument("--faults", default=6, metavar="N", help="kinds of faults, from 6 to 12 (default: 6)")
    add(_ui, "serve the MLflow UI on the store")
    return parser


def _add_fields(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Add the configuration's fields as options; what they are given is checked by the configuration."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of values; the options win over it")
    for name, field in config.model_fields.items():
        choices = ",".join(map(str, get_args(field.annotation)))
        about: dict[str, Any] = {"metavar": f"{{{choices}}}" if choices else field.annotation.__name__}
        if field.annotation is bool:  # the file MLproject can only write `--flip true`
            about = {"metavar": "true|false", "nargs": "?", "const": "true"}
        text = f"{field.description} (default: {field.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **about)


def _config(config: type[Config], given: argparse.Namespace) -> Any:
    values = read_yaml(given.config) if given.config else {}
    return config(**values | {name: value for name, value in vars(given).items() if name in config.model_fields})


def _say(run: Any, *lines: str) -> None:
    from demo_lib.store import ui_link

    print(*lines, f"run {run.info.run_id}", f"{ui_link(run)}{_how_to_start()}", sep="\n")


def _how_to_start() -> str:
    return "" if tracking_uri().startswith("http") else f"  (start the UI with: {PYTHON} -m demo_lib ui)"


# Each command imports what it needs: PyTorch and MLflow take seconds to load.
def _doctor(given: argparse.Namespace) -> int:
    from demo_lib.ops.doctor import examine

    findings = examine()
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def _train(given: argparse.Namespace) -> None:
    config = _config(TrainConfig, given)
    from demo_lib.recipe import train_together

    run = train_together(config)
    if run is None:  # a process of torchrun that is not the first
        return
    accuracy, seconds = run.data.metrics["test_accuracy"], run.data.metrics["fit_seconds"]
    _say(run, f"test accuracy {accuracy:.2%} after {seconds:.1f} s of training")


def _tune(given: argparse.Namespace) -> None:
    if given.join is not None:
        if given.config or given.dask or TuneConfig.model_fields.keys() & vars(given).keys():
            raise DemoError("--join takes the configuration from the study: leave out all options but --storage.")
        from demo_lib.ops.workers import join

        return join(given.join, given.storage)
    config = _config(TuneConfig, given)
    from demo_lib.ops.workers import tune

    run = tune(config, storage=given.storage, dask=given.dask)
    tags, metrics = run.data.tags, run.data.metrics
    _say(
        run,
        f"best of {config.trials} trials: number {tags['best_trial']}, run {tags['best_run_id']}",
        f"validation accuracy {metrics['best_val_accuracy']:.2%}, test accuracy {metrics['test_accuracy']:.2%}",
    )


def _run(given: argparse.Namespace) -> int:
    from demo_lib.ops import batch, remote

    if given.join:
        remote.join(*given.join)
        return 0
    if given.dask and given.jobs:
        raise DemoError("a Dask cluster knows how many jobs it does at once: leave out --jobs.")
    if given.resume is not None:
        if given.lessons or given.param or given.file or given.sweep or given.output:
            raise DemoError("--resume takes all from the batch: leave out everything but --jobs and --dask.")
        done = batch.resume(given.resume, given.jobs, given.dask)
    else:
        batch.run(done := _jobs(given), given.jobs, given.dask)
    folder = os.path.commonpath([job.output.parent for job in done])
    print(f"\nThe executed notebooks are in {folder}. See the runs in MLflow: {PYTHON} -m demo_lib ui")
    return 0 if all(job.status == "FINISHED" for job in done) else 1


def _jobs(given: argparse.Namespace) -> list:
    from demo_lib.ops.jobs import plan, read_sets, sweep

    params, output = read_yaml(given.file) if given.file else {}, given.output or settings().home / "build"
    if given.sweep is None:
        return plan(given.lessons, params | dict(given.param), output)
    sets = read_sets(given.sweep)
    if twice := [name for name, _ in given.param if any(name in each for each in sets)]:
        raise DemoError(f"{given.sweep} gives {twice[0]}, too: leave out -p {twice[0]}, or take it out of the sets.")
    return sweep(given.lessons, sets, params | dict(given.param), output)


def _plot(given: argparse.Namespace) -> None:
    from demo_lib.plots import loss_curve
    from demo_lib.runs import find_run, histories
    from demo_lib.store import open_store

    from mlflow import MlflowClient

    open_store()
    run = find_run(given.run_id)
    history = histories([run.info.run_id], ["train_loss", "val_loss"])
    if history.empty:
        raise DemoError(f"run {run.info.run_id} has logged no loss: choose a run that trained a network.")
    figure = loss_curve(history, f"Loss of {run.info.run_name}")
    MlflowClient().log_figure(run.info.run_id, figure, "loss_curve.png")
    _say(run, "logged loss_curve.png")


def _export(given: argparse.Namespace) -> None:
    from demo_lib.runs import export
    from demo_lib.store import open_store

    open_store()
    export(given.run_id, given.to)
    print(f"wrote {given.to}")


def _reproduce(given: argparse.Namespace) -> int:
    from demo_lib.ops.reproduce import reproduce

    result = reproduce(given.run_id)
    _say(result.run, str(result))
    return 0 if result.same else 1


def _push(given: argparse.Namespace) -> None:
    from demo_lib.ops.push import push
    from demo_lib.store import ui_link

    run = push(given.run_id, given.to, given.experiment, given.register)
    print(f"copied to {given.to}", f"run {run.info.run_id}", sep="\n")
    if given.to.startswith("http"):
        print(ui_link(run, given.to))


def _check(given: argparse.Namespace) -> int:
    from demo_lib.exercises import EXERCISES, check_all, find_exercise

    lessons = {number[:2] for number in EXERCISES}
    for each in given.wanted:
        if each not in lessons:
            find_exercise(each)
    numbers = [number for number in EXERCISES if not given.wanted or {number, number[:2]} & {*given.wanted}]
    replies = check_all(numbers)
    print(*(f"{each.number}  {each.answer:13}  {each.title}" for each in replies), sep="\n")
    shown = [each for each in replies if given.wanted or each.answer != "not attempted"]
    print(*(f"\n{each}" for each in shown), sep="\n")
    if len(shown) < len(replies):
        print(f"\n`{PYTHON} -m demo_lib check 02` says where it looks for attempts at the exercises of lesson 02.")
    return 0 if all(each.answer == "passed" for each in replies) else 1


def _hunt(given: argparse.Namespace) -> None:
    from demo_lib.exercises import hunt

    made = hunt(given.seed, given.faults)
    print(made.text, f"{made.link}{_how_to_start()}", sep="\n")


def _ui(given: argparse.Namespace) -> int:
    from demo_lib.ops.processes import QUIET, OwnedProcess, refuse_port, without_mlflow
    from demo_lib.store import open_store

    uri, port = tracking_uri(), settings().ui_port
    if uri.startswith("http"):
        raise DemoError(f"the runs are on a server: open {without_login(uri)} in a browser.")
    open_store()
    todo = f"if the MLflow UI is there, open http://127.0.0.1:{port}, else set DEMO_UI_PORT to a free one"
    refuse_port("127.0.0.1", port, todo)
    # One worker is enough for one person. The address may hold a password, so it is not on the line.
    environment = without_mlflow(os.environ) | QUIET | {"MLFLOW_BACKEND_STORE_URI": uri}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level=warning"]
    if (database := sqlite_file(uri)) is not None:
        command += ["--artifacts-destination", str(database.parent / "artifacts")]
    print(f"MLflow UI on http://127.0.0.1:{port}/#/experiments (stop it with Ctrl-C)", flush=True)
    with OwnedProcess(command, None, environment) as server:
        while server.exit_code is None:
            time.sleep(0.2)
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main())
