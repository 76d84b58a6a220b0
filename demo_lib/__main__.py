"""Command line: `python -m demo_lib doctor | train | tune | run | plot | ...`, each with `--help`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_lib.config import Config, DemoError, TrainConfig, TuneConfig, read_yaml, settings

from pydantic_settings import BaseSettings, CliSettingsSource

# How to start this Python again: `make` does not activate the environment.
PYTHON = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)


class _TrainOptions(BaseSettings, TrainConfig):
    """The fields of TrainConfig as command-line options."""


class _TuneOptions(BaseSettings, TuneConfig):
    """The fields of TuneConfig as command-line options."""


class _Flag(argparse.BooleanOptionalAction):
    """An option given as `--flip` or `--no-flip` and, as the file MLproject must write it, as `--flip true`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        negated = option_string.startswith("--no-")
        if negated and values is not None:
            parser.error(f"{option_string} takes no value: {values}")
        setattr(namespace, self.dest, not negated if values is None else values)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(arguments)
    try:
        return given.do(given)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    """Return the command line; each command's `do` takes the parsed arguments and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo_lib", description="The MLflow demo series.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("doctor", help="check this machine and say what to fix").set_defaults(do=_doctor)

    # No abbreviations: `mlflow run -P epoch=1` appends `--epoch 1`, which must not pass for `--epochs 1`.
    train = commands.add_parser("train", help="train one model, tracked in MLflow", allow_abbrev=False)
    config = _add_config(train, TrainConfig, _TrainOptions)
    train.set_defaults(do=lambda given: _train(config(given)))

    tune = commands.add_parser("tune", help="tune: one parent run, one child run a trial", allow_abbrev=False)
    tune.add_argument("--storage", metavar="URL", help="Optuna's database (default: store/optuna.db)")
    study = _add_config(tune, TuneConfig, _TuneOptions)
    tune.set_defaults(do=lambda given: _tune(study(given), given.storage))

    run = commands.add_parser("run", help="run lessons headless through papermill")
    run.add_argument("lessons", nargs="*", metavar="LESSON", help="number, name or path of a lesson (default: all)")
    run.add_argument("--jobs", type=int, default=0, metavar="N", help="lessons at once (default: one a core)")
    run.add_argument("-f", "--file", type=Path, metavar="FILE", help="YAML file of parameters")
    run.add_argument("-p", "--param", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--output", type=Path, metavar="DIR", help="folder for executed notebooks (default: build)")
    run.set_defaults(do=_run)

    plot = commands.add_parser("plot", help="draw a run's loss curve and log it to the run")
    plot.add_argument("run_id", help="the run's id or its first digits")
    plot.set_defaults(do=lambda given: _plot(given.run_id))

    export = commands.add_parser("export", help="write a run's configuration or its metrics to a file")
    export.add_argument("run_id", help="the run's id or its first digits")
    export.add_argument("--to", type=Path, required=True, metavar="FILE", help="FILE.yaml, FILE.csv or FILE.parquet")
    export.set_defaults(do=lambda given: _export(given.run_id, given.to))

    reproduce = commands.add_parser("reproduce", help="train a run again and compare every metric step by step")
    reproduce.add_argument("run_id", help="the run's id or its first digits")
    reproduce.set_defaults(do=lambda given: _reproduce(given.run_id))

    ui = commands.add_parser("ui", help="open the MLflow UI on the store")
    ui.add_argument("--port", type=int, help="default: DEMO_UI_PORT or 5050")
    ui.set_defaults(do=_ui)
    return parser


def _add_config(
    parser: argparse.ArgumentParser, config: type[Config], options: type[BaseSettings]
) -> Callable[[argparse.Namespace], Config]:
    """Add the configuration's fields as options; return what makes a configuration of the parsed arguments."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of values; the options win over it")
    source = CliSettingsSource(
        options,
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        add_argument_method=_add_argument,
    )

    def make(given: argparse.Namespace) -> Config:
        values = read_yaml(given.config) if given.config else {}
        fields = {name: value for name, value in vars(given).items() if name in config.model_fields}
        return config(**values | source(parsed_args=fields)())

    return make


def _add_argument(parser: argparse.ArgumentParser, *names: str, **kwargs: Any) -> None:
    if kwargs.get("action") is argparse.BooleanOptionalAction:
        kwargs["action"] = _Flag
    parser.add_argument(*names, **kwargs)


# Each command imports what it needs: PyTorch and MLflow take seconds to load.


def _doctor(given: argparse.Namespace) -> int:
    from demo_lib.doctor import examine

    findings = examine()
    print("\n".join(map(str, findings)))
    return 0 if all(finding.ok for finding in findings) else 1


def _train(config: TrainConfig) -> int:
    from demo_lib.tracking import train, ui_link

    run = train(config)
    metrics = run.data.metrics
    print(f"test accuracy {metrics['test_accuracy']:.2%} after {metrics['fit_seconds']:.1f} s of training")
    print(f"run {run.info.run_id}\n{ui_link(run)}  (start the UI with: {PYTHON} -m demo_lib ui)")
    return 0


def _tune(config: TuneConfig, storage: str | None) -> int:
    from demo_lib.tracking import ui_link
    from demo_lib.tuning import tune

    run = tune(config, storage=storage)
    tags, metrics = run.data.tags, run.data.metrics
    print(f"best of {config.trials} trials: number {tags['best_trial']}, run {tags['best_run_id']}")
    print(f"validation accuracy {metrics['best_val_accuracy']:.2%}, test accuracy {metrics['test_accuracy']:.2%}")
    print(f"parent run {run.info.run_id}\n{ui_link(run)}  (start the UI with: {PYTHON} -m demo_lib ui)")
    return 0


def _run(given: argparse.Namespace) -> int:
    from demo_lib import batch

    if given.jobs < 0:
        raise DemoError(f"--jobs {given.jobs} is not allowed: it must be 1 or more, or 0 for one a core.")
    params = (read_yaml(given.file) if given.file else {}) | dict(given.param)
    jobs = batch.plan(given.lessons, params, given.output or settings().home / "build")
    try:
        batch.run(jobs, given.jobs)
    finally:
        print(batch.table(jobs))
    print(f"\nSee the runs in MLflow: {PYTHON} -m demo_lib ui")
    return 0 if all(job.status == "FINISHED" for job in jobs) else 1


def _plot(run_id: str) -> int:
    from demo_lib.plots import loss_curve
    from demo_lib.runs import find_run, histories
    from demo_lib.tracking import MlflowClient, open_store, ui_link

    open_store()
    run = find_run(run_id)
    history = histories(run.info.run_id, ["train_loss", "val_loss"])
    if history.empty:
        raise DemoError(f"run {run.info.run_id} has logged no train_loss and no val_loss: choose another run.")
    epochs = history[history.metric == "val_loss"].step.tolist()
    figure = loss_curve(history, epochs, f"Loss of {run.info.run_name}")
    MlflowClient().log_figure(run.info.run_id, figure, "loss_curve.png")
    print(f"logged loss_curve.png to run {run.info.run_id}\n{ui_link(run)}")
    return 0


def _export(run_id: str, path: Path) -> int:
    from demo_lib.runs import export_metrics, export_params
    from demo_lib.tracking import open_store

    open_store()
    write = export_params if path.suffix.lower() in (".yaml", ".yml") else export_metrics
    write(run_id, path)
    print(f"wrote {path}")
    return 0


def _reproduce(run_id: str) -> int:
    from demo_lib.reproduce import reproduce
    from demo_lib.tracking import ui_link

    result = reproduce(run_id)
    print(f"{result}\nrun {result.run.info.run_id}\n{ui_link(result.run)}")
    return 0 if not result.difference else 1


def _ui(given: argparse.Namespace) -> int:
    from demo_lib.tracking import serve_ui

    return serve_ui(given.port or settings().ui_port)


if __name__ == "__main__":
    sys.exit(main())
