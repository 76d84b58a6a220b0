"""Command line: `python -m server start | stop | ...`, each with `--help`."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from demo_lib.config import DemoError, refuse_lost_folder

from server import process
from server.settings import Flags, ServerSettings, read_settings


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 not in order, 2 bad input, 130 interrupted."""
    try:
        refuse_lost_folder()
        given = _parser().parse_args(arguments)
        flags = {name: value for name, value in vars(given).items() if name in Flags.model_fields}
        settings = read_settings(**flags)
        if settings.address is None:  # what the shell has for another PostgreSQL would lead away from the server's own
            for name in [name for name in os.environ if name.startswith("PG")]:
                del os.environ[name]
        return given.do(settings, given) or 0
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `progress --watch 5 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    """Return the command line; each command's `do` takes settings and arguments, and returns an exit code or None."""
    parser = argparse.ArgumentParser(prog="python -m server", description="The tracking server for a team.")
    flags = argparse.ArgumentParser(add_help=False)
    for name, field in Flags.model_fields.items():  # the settings check their values
        default = str(field.get_default(call_default_factory=True)).replace("%", "%%")
        about = f"{field.description} (default: {default})" if default else field.description
        bare = {"nargs": "?", "const": True, "metavar": "true|false"} if field.annotation is bool else {}
        flags.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=about, **bare)

    def add(to: argparse._SubParsersAction, name: str, do: Callable, text: str) -> argparse.ArgumentParser:
        command = to.add_parser(name, help=text, description=text, parents=[flags], allow_abbrev=False)
        command.set_defaults(do=do)
        return command

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add(commands, "start", _start, "run the server until Ctrl-C")
    add(commands, "stop", _stop, "end the server with all its processes")
    add(commands, "check", _check, "ask the database, write an artifact, and name what fails")
    add(commands, "backup", _backup, "write database and artifacts to a new folder").add_argument("place", type=Path)
    add(commands, "restore", _restore, "fill an empty server from a backup").add_argument("place", type=Path)
    cleanup = add(commands, "cleanup", _cleanup, "remove for good what was deleted, children included")
    cleanup.add_argument("--older-than", default="30d", metavar="TIME", help="how long ago, such as 12h (default: 30d)")
    cleanup.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    people = commands.add_parser("participants", help="accounts, and experiments for each person")
    actions = people.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = add(actions, "add", _participants, "give each person in a CSV file an account, and what is missing")
    new.add_argument("file", type=Path, help="CSV file with a column `name`")
    add(actions, "list", _participants, "show the participants")
    again = add(actions, "reset", _participants, "give a participant a new password")
    again.add_argument("name")
    for each in (new, again):
        each.add_argument(
            "--sheet", type=Path, required=True, help="CSV file for the passwords; other lines in it stay"
        )
    add(actions, "remove", _participants, "delete a participant's account and keep the runs").add_argument("name")
    shown = add(commands, "progress", _progress, "show who has run lessons, passed exercises, or is stuck")
    shown.add_argument("--csv", type=Path, metavar="FILE", help="also write all columns to FILE")
    shown.add_argument("--watch", type=float, metavar="SECONDS", help="show it again and again, until Ctrl-C")
    shown.add_argument("--anonymous", action="store_true", help="leave the names out")
    return parser


def _start(settings: ServerSettings, given: argparse.Namespace) -> None:
    process.start(settings)
    print("stopped.")


def _stop(settings: ServerSettings, given: argparse.Namespace) -> None:
    print("stopped." if process.stop(settings) else f"no server runs in {settings.folder}.")


def _check(settings: ServerSettings, given: argparse.Namespace) -> int:
    from server.readiness import examine  # late, as below: MLflow takes seconds to load

    findings = examine(settings)
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def _backup(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server.backup import back_up

    manifest = back_up(settings, given.place.absolute())
    files = sum(name.startswith("artifacts/") for name in manifest["files"])
    print(f"backed up {manifest['counts']['runs']} runs and {files} files of artifacts to {given.place}.")
    if "://" in manifest["artifacts"]:
        print(f"Not in it: artifacts at {manifest['artifacts']}; copy them by their provider's tool, as `aws s3 sync`.")


def _restore(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server.backup import restore

    print(f"restored {restore(settings, given.place)['counts']['runs']} runs from {given.place}.")


def _cleanup(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server.cleanup import clean_up

    found = clean_up(settings, given.older_than, given.dry_run)
    what = f"{len(found.runs)} runs, {len(found.models)} models and {len(found.experiments)} experiments."
    print(*found.kept, f"{'would remove' if given.dry_run else 'removed'} {what}", sep="\n")


def _participants(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server import participants

    if given.action == "add":
        names = participants.read_names(given.file)
        new = participants.add(settings, names, partial(participants.write_sheet, given.sheet))
        print(f"{len(new)} new, {len(names) - len(new)} already there.")
    elif given.action == "list":
        print(*participants.participants(settings) or ["no participants yet."], sep="\n")
    elif given.action == "reset":
        participants.reset(settings, given.name, partial(participants.write_sheet, given.sheet))
        print(f"written to {given.sheet}; the old password may work for up to {process.CACHE_SECONDS} s more.")
    else:
        participants.remove(settings, given.name)
        print(f"{given.name} is removed; the runs are kept.")


def _progress(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server import progress

    if given.watch is not None and not 1 <= given.watch <= 3600:
        raise DemoError(f"--watch {given.watch:g} is not allowed: give a number of seconds from 1 to 3600.")
    begin = "\x1b[H\x1b[J" if given.watch and sys.stdout.isatty() else ""  # the screen's corner, empty from there on
    while True:
        try:
            table = progress.progress(settings)
            if given.csv:
                progress.write_csv(table, given.csv, given.anonymous)
            text = progress.as_text(table, given.anonymous)
        except DemoError as error:
            if not given.watch:
                raise
            text = f"error: {error}"  # a server that restarts is there again at the next look
        print(begin + text, flush=True)
        if not given.watch:
            return
        print(f"\n{time.strftime('%H:%M:%S')}, again every {given.watch:g} s; Ctrl-C ends it.", flush=True)
        time.sleep(given.watch)


if __name__ == "__main__":
    process.ends_interrupt()
    sys.exit(main())
