"""Participants: an account each, experiments that only they can write, and the shared examples to read."""

import csv
import io
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from demo_lib.config import DemoError, lessons, whole_file

import mlflow

from server.client import as_admin, call
from server.settings import ServerSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")  # no dot and no slash: they end the person's part of a name
OTHERS = ("batch", "exercises", "hunt", "reproduce", "train", "tune")  # experiments besides the lessons' own
SHARED = "shared"


def read_names(path: Path) -> list[str]:
    """Return the names in the column `name` of the CSV file; a `DemoError` for a bad file, a bad name or one twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        mark = ";" if ";" in text.partition("\n")[0] else ","  # as spreadsheets write it where 1.5 is 1,5
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=mark, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"{path} can't be read ({error}): name a CSV file with a column `name`, in UTF-8.") from None
    header, *lines = [row for row in rows if any(row)] or [[]]  # programs leave empty rows at the end
    if not lines or "name" not in header:
        raise DemoError(f"{path} needs a first line with a column `name`, with commas, and a line for each person.")
    names = [dict(zip(header, line, strict=False)).get("name", "") for line in lines]
    if bad := [name for name in names if not NAME.fullmatch(name)]:
        raise DemoError(f"{path}: the name {bad[0]!r} is not allowed: use 1 to 32 letters a-z, digits, - and _.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DemoError(f"{path}: the name {twice[0]!r} is there twice: give each person a name of their own.")
    return names


def add(settings: ServerSettings, names: Sequence[str], hand_out: Callable[[dict[str, str]], None]) -> list[str]:
    """Give each person what is missing: an account, experiments with EDIT, READ on the shared ones; return the new.

    `hand_out` gets the passwords of new people by name, before the first account is made: none can be lost. What is
    there stays as it is, so the same call completes what a failure cut off.

    Raises:
        DemoError: a name is taken, an experiment belongs to somebody else, or the server refuses or ends.
    """
    known, there = participants(settings), experiments(settings)
    for name in names:
        _refuse(settings, name, known, there)
    shared = {number: "READ" for name, number in there.items() if name.startswith(f"{SHARED}/")}
    new = {name: secrets.token_hex(8) for name in names if name not in known}
    if new:
        hand_out(new)
    for name in names:
        if name in new:
            _ask(settings, "POST", "2.0/mlflow/users/create", username=name, password=new[name])
        for each in area(name):
            if each not in there:
                there[each] = _ask(settings, "POST", "2.0/mlflow/experiments/create", name=each)["experiment_id"]
        for number, permission in (shared | {there[each]: "EDIT" for each in area(name)}).items():
            if number not in known.get(name, {}):
                what = {"resource_type": "experiment", "resource_id": number, "permission": permission}
                _ask(settings, "POST", "3.0/mlflow/users/permissions/grant", username=name, **what)
    return list(new)


def participants(settings: ServerSettings) -> dict[str, dict[str, str]]:
    """Return each participant's permissions, by name and then by the experiment's id."""
    found = {}
    for user in _ask(settings, "GET", "2.0/mlflow/users/list")["users"]:
        if not user["is_admin"]:
            grants = [each for role in user["roles"] for each in role["permissions"]]
            grants = [each for each in grants if each["resource_type"] == "experiment"]
            found[user["username"]] = {each["resource_pattern"]: each["permission"] for each in grants}
    return dict(sorted(found.items()))


def reset(settings: ServerSettings, name: str, hand_out: Callable[[dict[str, str]], None]) -> None:
    """Give the participant a new password, which `hand_out` gets before, as in `add`.

    The old one works for at most `process.CACHE_SECONDS` more.

    Raises:
        DemoError: there is no such participant, or the server refuses or ends.
    """
    _require(settings, name)
    password = secrets.token_hex(8)  # no two of its letters look alike on paper
    hand_out({name: password})
    _ask(settings, "PATCH", "2.0/mlflow/users/update-password", username=name, password=password)


def remove(settings: ServerSettings, name: str) -> None:
    """Delete the participant's account; experiments, runs and models stay, and come back with the name."""
    _require(settings, name)
    _ask(settings, "DELETE", "2.0/mlflow/users/delete", username=name)


def area(name: str) -> list[str]:
    """Return the names of the person's experiments, which the lessons use for this login."""
    return [f"{name}/{each}" for each in [*(path.stem for path in lessons()), *OTHERS]]


def write_sheet(path: Path, passwords: dict[str, str]) -> None:
    """Write the passwords to the CSV file, which only its owner can read; other people's lines in it stay."""
    try:
        before = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))) if path.exists() else []
        if any(set(line) != {"name", "password"} for line in before):
            raise DemoError(f"the sheet {path} has other columns than name and password: choose another --sheet.")
        known = {line["name"]: line["password"] for line in before} | passwords
        with whole_file(path, private=True) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("name", "password"), *known.items()])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"the sheet {path} can't be written ({error}): choose another --sheet.") from None


def experiments(settings: ServerSettings) -> dict[str, str]:
    """Return the id of every experiment by its name."""
    with as_admin(settings):
        return {each.name: each.experiment_id for each in mlflow.search_experiments()}


def _refuse(settings: ServerSettings, name: str, known: dict[str, dict], there: dict[str, str]) -> None:
    """Look for all that could stop `add` half-way."""
    if name in (settings.admin_name, SHARED):
        raise DemoError(f"the name {name!r} is taken: choose another.")
    for each in area(name):
        if owner := [other for other in known if other != name and known[other].get(there.get(each)) == "MANAGE"]:
            raise DemoError(f"the experiment {each!r} belongs to {owner[0]!r}: rename it.")


def _require(settings: ServerSettings, name: str) -> None:
    """Raise a `DemoError` if there is no such participant."""
    if name not in (names := participants(settings)):
        raise DemoError(f"there is no participant {name!r}; there are: {', '.join(names) or 'none'}.")


def _ask(settings: ServerSettings, method: str, route: str, **body: object) -> dict:
    """Send a request as the administrator and return the answer."""
    if not settings.accounts:
        raise DemoError("the profile local has no accounts: use --profile workshop, as for `start`.")
    answer = call(settings, method, f"/api/{route}", json=body)
    if not answer.ok:
        raise DemoError(f"{settings.url} refuses {route} ({answer.status_code}: {answer.text[:200]}): fix that.")
    return answer.json() if answer.content else {}
