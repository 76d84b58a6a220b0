"""Command line: `python -m demo_lib doctor | train | run | ui`, each with `--help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, read_yaml, settings

from pydantic_settings import BaseSettings, CliSettingsSource

FIELDS = TrainConfig.model_fields


class _TrainArguments(BaseSettings, TrainConfig):
    """The fields of TrainConfig as command-line options."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m demo_lib", description="The MLflow demo series.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("doctor", help="check this machine and say what to mend").set_defaults(do=_doctor)

    train = commands.add_parser("train", help="train one model, tracked in MLflow")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML file of values; the options below win over it")
    options = CliSettingsSource(_TrainArguments, root_parser=train, cli_kebab_case=True, cli_implicit_flags=True)
    train.set_defaults(do=lambda given: _train(given, options))

    run = commands.add_parser("run", help="run lessons headless through papermill")
    run.add_argument("lessons", nargs="*", metavar="LESSON", help="number, name or path of a lesson (default: all)")
    run.add_argument("--jobs", type=int, default=0, metavar="N", help="lessons at once (default: one a core)")
    run.add_argument("-f", "--file", type=Path, metavar="FILE", help="YAML file of parameters")
    run.add_argument("-p", "--param", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--output", type=Path, metavar="DIR", help="folder for executed notebooks (default: build)")
    run.set_defaults(do=_run)

    ui = commands.add_parser("ui", help="open the MLflow UI on the store")
    ui.add_argument("--port", type=int, help="default: DEMO_UI_PORT or 5050")
    ui.set_defaults(do=_ui)

    given = parser.parse_args(arguments)
    try:
        return given.do(given)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


# Each command imports what it needs: PyTorch and MLflow take seconds to load.


def _doctor(given: argparse.Namespace) -> int:
    from demo_lib.doctor import examine

    findings = examine()
    print("\n".join(map(str, findings)))
    return 0 if all(finding.ok for finding in findings) else 1


def _train(given: argparse.Namespace, options: CliSettingsSource) -> int:
    values = read_yaml(given.config) if given.config else {}
    values |= options(parsed_args={name: value for name, value in vars(given).items() if name in FIELDS})()
    config = TrainConfig(**values)
    from demo_lib.tracking import train, ui_link

    run = train(config)
    metrics = run.data.metrics
    print(f"test accuracy {metrics['test_accuracy']:.2%} after {metrics['fit_seconds']:.1f} s of training")
    print(f"run {run.info.run_id}\n{ui_link(run)}  (start the UI with: python -m demo_lib ui)")
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
    print("\nSee the runs in MLflow: python -m demo_lib ui")
    return 0 if all(job.status == "FINISHED" for job in jobs) else 1


def _ui(given: argparse.Namespace) -> int:
    from demo_lib.tracking import serve_ui

    return serve_ui(given.port or settings().ui_port)


if __name__ == "__main__":
    sys.exit(main())
