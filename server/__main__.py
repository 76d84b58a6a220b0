"""Command line: `python -m server start | stop | ...`, each with `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from demo_lib.config import DemoError

from pydantic_settings import CliSettingsSource

from server.settings import Secrets, ServerSettings, SettingsFromEnvironment, read_settings

Do = Callable[[argparse.Namespace, ServerSettings, Secrets], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 not in order, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(arguments)
    try:
        flags = {name: value for name, value in vars(given).items() if name in ServerSettings.model_fields}
        return given.do(given, *read_settings(**given.flags(parsed_args=flags)()))
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server", description="The tracking server for a team.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "start", "run the server until Ctrl-C", _start)
    _add(commands, "stop", "end the server with all its processes", _stop)
    _add(commands, "check", "ask the database, write an artifact, and name what fails", _check)
    backup = _add(commands, "backup", "write database and artifacts to a new folder", _backup)
    backup.add_argument("target", type=Path, metavar="DIR")
    restore = _add(commands, "restore", "fill an empty server from a backup", _restore)
    restore.add_argument("source", type=Path, metavar="DIR")
    cleanup = _add(commands, "cleanup", "remove for good what was deleted, children included", _cleanup)
    cleanup.add_argument("--older-than", default="30d", metavar="TIME", help="how long ago, such as 12h (default: 30d)")
    cleanup.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    participants = commands.add_parser("participants", help="accounts, and experiments for each person")
    actions = participants.add_subparsers(dest="action", required=True, metavar="ACTION")
    adding = _add(actions, "add", "give each person in a CSV file an account, and what is missing", _participants_add)
    adding.add_argument("file", type=Path, help="CSV file with a column `name`")
    adding.add_argument("--sheet", type=Path, help="CSV file for the passwords (default: they are printed once)")
    adding.add_argument("--shared", action="append", default=[], help="experiment to read (default: those in shared/)")
    _add(actions, "list", "show the participants", _participants_list)
    for name, text, do in (
        ("reset", "give a participant a new password and print it", _participants_reset),
        ("remove", "delete a participant's account and keep the runs", _participants_remove),
    ):
        _add(actions, name, text, do).add_argument("name", help="the participant")
    _add(commands, "progress", "show who has finished runs of which lessons", _progress)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, text: str, do: Do) -> argparse.ArgumentParser:
    """Add a command with the settings as flags; `do` takes the arguments, settings and secrets."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    source = CliSettingsSource(
        SettingsFromEnvironment, root_parser=parser, cli_kebab_case=True, cli_implicit_flags=True
    )
    parser.set_defaults(do=do, flags=source)
    return parser


def _start(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.process import start

    start(settings, secrets)
    print("stopped.")
    return 0


def _stop(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.process import stop

    print("stopped." if stop(settings) else f"no server runs in {settings.folder}.")
    return 0


def _check(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.readiness import examine

    findings = examine(settings, secrets)
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def _backup(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.backup import back_up

    manifest = back_up(settings, secrets, given.target.absolute())
    print(f"backed up {_contents(manifest)} to {given.target}.")
    if "://" in manifest["artifacts"]:
        print(f"Not in it: artifacts at {manifest['artifacts']}; copy them by their provider's tool, as `aws s3 sync`.")
    return 0


def _restore(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.backup import restore

    print(f"restored {_contents(restore(settings, secrets, given.source.absolute()))} from {given.source}.")
    return 0


def _contents(manifest: dict) -> str:
    counts = manifest["counts"]
    return f"{counts['runs']} runs, {counts['metrics']} metrics and {len(manifest['files']) - 1} artifact files"


def _cleanup(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.cleanup import clean_up

    found = clean_up(settings, secrets, given.older_than, given.dry_run)
    print(*found.kept, f"{'would remove' if given.dry_run else 'removed'} {found}", sep="\n")
    return 0


def _participants_add(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.participants import add, read_names, write_sheet

    def hand_out(passwords: dict[str, str]) -> None:
        if given.sheet:
            write_sheet(given.sheet, passwords)
        else:
            print("name,password", *(f"{name},{password}" for name, password in passwords.items()), sep="\n")

    names = read_names(given.file)
    new = add(settings, secrets, names, hand_out, given.shared)
    where = f"; passwords: {given.sheet}" if new and given.sheet else ""
    print(f"{len(new)} new, {len(names) - len(new)} already there{where}.")
    return 0


def _participants_list(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.participants import table

    people = table(settings, secrets)
    print("no participants yet." if people.empty else people.reset_index().to_string(index=False))
    return 0


def _participants_reset(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.participants import reset
    from server.process import CACHE_SECONDS

    print(reset(settings, secrets, given.name))
    print(f"the old password may work for up to {CACHE_SECONDS} s more.", file=sys.stderr)
    return 0


def _participants_remove(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.participants import remove

    remove(settings, secrets, given.name)
    print(f"{given.name} is removed; the runs are kept.")
    return 0


def _progress(given: argparse.Namespace, settings: ServerSettings, secrets: Secrets) -> int:
    from server.progress import progress

    # Numbers in place of names: the table is to fit a terminal of 80 columns.
    table = progress(settings, secrets).rename(columns=lambda name: name[:2] if name[:2].isdigit() else name)
    times = table.pop("last_activity").dt.strftime("%Y-%m-%d %H:%M")
    print(table.assign(**{"last activity (UTC)": times.fillna("-")}).reset_index().to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
