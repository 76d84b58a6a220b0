"""Command line: `python -m server start | stop | ...`, each with `--help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_lib.config import DemoError

from pydantic_settings import CliSettingsSource

from server import process
from server.settings import Flags, FlagSettings, ServerSettings, read_settings


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 not in order, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(arguments)
    try:
        flags = {name: value for name, value in vars(given).items() if name in Flags.model_fields}
        return given.do(read_settings(**given.flags(parsed_args=flags)()), given) or 0
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def _start(settings: ServerSettings, given: argparse.Namespace) -> None:
    process.start(settings)
    print("stopped.")


def _stop(settings: ServerSettings, given: argparse.Namespace) -> None:
    print("stopped." if process.stop(settings) else f"no server runs in {settings.folder}.")


def _check(settings: ServerSettings, given: argparse.Namespace) -> int:
    from server.readiness import examine

    findings = examine(settings)
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def _backup(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server import backup

    act = backup.back_up if given.command == "backup" else backup.restore
    manifest = act(settings, given.place.absolute())
    counts, files = manifest["counts"], len(manifest["files"]) - 1
    what = f"{counts['runs']} runs, {counts['metrics']} metrics and {files} artifact files"
    if given.command == "restore":
        return print(f"restored {what} from {given.place}.")
    print(f"backed up {what} to {given.place}.")
    if "://" in manifest["artifacts"]:
        print(f"Not in it: artifacts at {manifest['artifacts']}; copy them by their provider's tool, as `aws s3 sync`.")


def _cleanup(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server.cleanup import clean_up

    found = clean_up(settings, given.older_than, given.dry_run)
    print(*found.kept, f"{'would remove' if given.dry_run else 'removed'} {found}", sep="\n")


def _participants(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server import participants

    def hand_out(passwords: dict[str, str]) -> None:
        if given.sheet:
            participants.write_sheet(given.sheet, passwords)
        else:
            print("name,password", *(f"{name},{password}" for name, password in passwords.items()), sep="\n")

    if given.action == "add":
        names = participants.read_names(given.file)
        new = participants.add(settings, names, hand_out, given.shared)
        where = f"; passwords: {given.sheet}" if new and given.sheet else ""
        print(f"{len(new)} new, {len(names) - len(new)} already there{where}.")
    elif given.action == "list":
        people = participants.table(settings)
        print("no participants yet." if people.empty else people.reset_index().to_string(index=False))
    elif given.action == "reset":
        print(participants.reset(settings, given.name))
        print(f"the old password may work for up to {process.CACHE_SECONDS} s more.", file=sys.stderr)
    else:
        participants.remove(settings, given.name)
        print(f"{given.name} is removed; the runs are kept.")


def _progress(settings: ServerSettings, given: argparse.Namespace) -> None:
    from server.progress import progress

    # Numbers in place of names: the table is to fit a terminal of 80 columns.
    table = progress(settings).rename(columns=lambda name: name[:2] if name[:2].isdigit() else name)
    times = table.pop("last_activity").dt.strftime("%Y-%m-%d %H:%M")
    print(table.assign(**{"last activity (UTC)": times.fillna("-")}).reset_index().to_string(index=False))


FOLDER = ("place", {"type": Path, "metavar": "DIR"})
NAME = ("name", {"help": "the participant"})
PARTICIPANTS = {
    "add": (
        "give each person in a CSV file an account, and what is missing",
        _participants,
        ("file", {"type": Path, "help": "CSV file with a column `name`"}),
        ("--sheet", {"type": Path, "help": "CSV file for the passwords (default: they are printed once)"}),
        ("--shared", {"action": "append", "default": [], "help": "experiment to read (default: those in shared/)"}),
    ),
    "list": ("show the participants", _participants),
    "reset": ("give a participant a new password and print it", _participants, NAME),
    "remove": ("delete a participant's account and keep the runs", _participants, NAME),
}
COMMANDS = {
    "start": ("run the server until Ctrl-C", _start),
    "stop": ("end the server with all its processes", _stop),
    "check": ("ask the database, write an artifact, and name what fails", _check),
    "backup": ("write database and artifacts to a new folder", _backup, FOLDER),
    "restore": ("fill an empty server from a backup", _backup, FOLDER),
    "cleanup": (
        "remove for good what was deleted, children included",
        _cleanup,
        ("--older-than", {"default": "30d", "metavar": "TIME", "help": "how long ago, such as 12h (default: 30d)"}),
        ("--dry-run", {"action": "store_true", "help": "only say what would be removed"}),
    ),
    "participants": ("accounts, and experiments for each person", PARTICIPANTS),
    "progress": ("show who has finished runs of which lessons", _progress),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server", description="The tracking server for a team.")
    _fill(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), COMMANDS)
    return parser


def _fill(commands: argparse._SubParsersAction, table: dict[str, tuple]) -> None:
    """Add commands: for each name its help, what it does or the table of its own commands, and its arguments."""
    for name, (text, do, *arguments) in table.items():
        parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if isinstance(do, dict):
            _fill(parser.add_subparsers(dest="action", required=True, metavar="ACTION"), do)
            continue
        source = CliSettingsSource(FlagSettings, root_parser=parser, cli_kebab_case=True, cli_implicit_flags=True)
        for argument, options in arguments:
            parser.add_argument(argument, **options)
        parser.set_defaults(do=do, flags=source)


if __name__ == "__main__":
    sys.exit(main())
