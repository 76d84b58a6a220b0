"""Participants: an account each, experiments that only they can write, and the shared examples to read."""

from __future__ import annotations

import csv
import io
import re
import secrets as random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_lib.batch import lessons

import pandas as pd

from server.client import call
from server.process import write_private
from server.settings import Secrets, ServerError, ServerSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")  # no dot and no slash: they end the person's part of a name
LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look alike on paper
OTHERS = ("batch", "train", "tune")  # experiments that lessons and commands use besides the lessons' own
SHARED = "shared/"
WRITE = ("EDIT", "MANAGE")


@dataclass(frozen=True)
class Account:
    """An account and what it was granted: permissions by the experiment's id."""

    name: str
    admin: bool
    experiments: dict[str, str]


def read_names(path: Path) -> list[str]:
    """Return the names in the column `name` of the CSV file.

    Raises:
        ServerError: the file can't be read, has no such column or no line, or a name is bad or there twice.
    """
    try:
        read = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        lines = [line for line in read if any(line.values())]  # programs leave empty rows at the end
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ServerError(f"{path} can't be read ({error}): name a CSV file with a column `name`, in UTF-8.") from None
    if not lines or "name" not in lines[0]:
        raise ServerError(f"{path} needs a first line with a column `name`, with commas, and a line for each person.")
    names = [(line["name"] or "").strip() for line in lines]
    if bad := [name for name in names if not NAME.fullmatch(name)]:
        raise ServerError(
            f"{path}: the name {bad[0]!r} is not allowed: use 1 to 32 letters a-z, digits, - and _, and begin with a "
            "letter or digit."
        )
    folded = [name.casefold() for name in names]
    if twice := [name for name in names if folded.count(name.casefold()) > 1]:
        raise ServerError(f"{path}: the name {twice[0]!r} is there twice: give each person a name of their own.")
    return names


def add(
    settings: ServerSettings,
    secrets: Secrets,
    names: Sequence[str],
    hand_out: Callable[[dict[str, str]], None],
    shared: Sequence[str] = (),
) -> list[str]:
    """Give each person what is missing: an account, experiments with EDIT, READ on the shared ones; return the new.

    `hand_out` gets the passwords of new people by name, before the first account is made: none can be lost. What is
    there stays as it is, so the same call completes what a failure cut off.

    Raises:
        ServerError: a name is an administrator's or differs from another only in case, an experiment is not there or
            belongs to somebody else, or the server refuses or ends.
    """
    known, there = accounts(settings, secrets), all_experiments(settings, secrets)
    _refuse(settings, names, known, there)
    readable = _shared(shared, known, there)
    new = {name: make_password() for name in names if name not in known}
    if new:
        hand_out(new)
    for name in names:
        if name in new:
            _ask(settings, secrets, "POST", "2.0/mlflow/users/create", username=name, password=new[name])
        granted = known[name].experiments if name in known else {}
        own = {_experiment(settings, secrets, there, each): "EDIT" for each in area(name)}
        for number, permission in (dict.fromkeys(readable, "READ") | own).items():
            if number not in granted:
                _grant(settings, secrets, name, number, permission)
    return list(new)


def accounts(settings: ServerSettings, secrets: Secrets) -> dict[str, Account]:
    """Return all accounts by name, the administrator's too."""
    users = _ask(settings, secrets, "GET", "2.0/mlflow/users/list")["users"]
    return {user["username"]: Account(user["username"], user["is_admin"], _granted(user)) for user in users}


def table(settings: ServerSettings, secrets: Secrets) -> pd.DataFrame:
    """Return for each participant the number of experiments they can write and of those they can only read."""
    people = [account for account in accounts(settings, secrets).values() if not account.admin]
    rows = [
        {"name": person.name, "own": own, "shared": len(person.experiments) - own}
        for person in people
        for own in [sum(permission in WRITE for permission in person.experiments.values())]
    ]
    return pd.DataFrame(rows, columns=["name", "own", "shared"]).set_index("name").sort_index()


def reset(settings: ServerSettings, secrets: Secrets, name: str) -> str:
    """Give the participant a new password and return it.

    A server process that has let the old one in goes on doing so for at most `process.CACHE_SECONDS`.

    Raises:
        ServerError: there is no such participant.
    """
    _require(settings, secrets, name)
    password = make_password()
    _ask(settings, secrets, "PATCH", "2.0/mlflow/users/update-password", username=name, password=password)
    return password


def remove(settings: ServerSettings, secrets: Secrets, name: str) -> None:
    """Delete the participant's account; experiments, runs and models stay, and come back with the name.

    Raises:
        ServerError: there is no such participant.
    """
    _require(settings, secrets, name)
    _ask(settings, secrets, "DELETE", "2.0/mlflow/users/delete", username=name)


def area(name: str) -> list[str]:
    """Return the names of the person's experiments, which `demo_lib.tracking.connect` uses for this login."""
    return [f"{name}/{each}" for each in [*(path.stem for path in lessons()), *OTHERS]]


def make_password() -> str:
    """Return a new password that can be read from paper: three groups of letters and digits."""
    return "-".join("".join(random.choice(LETTERS) for _ in range(5)) for _ in range(3))


def write_sheet(path: Path, passwords: dict[str, str]) -> None:
    """Write the passwords to the CSV file, which only its owner can read; other people's lines in it stay.

    Raises:
        ServerError: the file is no such sheet, or can't be read or written.
    """
    try:
        before = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))) if path.exists() else []
        if any(set(line) != {"name", "password"} for line in before):
            raise ServerError(f"the sheet {path} has other columns than name and password: choose another --sheet.")
        known = {line["name"]: line["password"] for line in before} | passwords
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("name", "password"), *known.items()])
        write_private(path, text.getvalue())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ServerError(f"the sheet {path} can't be written ({error}): choose another --sheet.") from None


def _refuse(settings: ServerSettings, names: Sequence[str], known: dict[str, Account], there: dict[str, dict]) -> None:
    """Look for all that could stop `add` half-way."""
    folded = {name.casefold(): name for name in known}
    for name in names:
        same = folded.get(name.casefold(), name)
        if name == settings.admin_name or (same in known and known[same].admin) or f"{name}/" == SHARED:
            raise ServerError(f"the name {name!r} is taken: choose another.")
        if same != name:
            raise ServerError(f"the names {name!r} and {same!r}, who has an account, differ only in case: change one.")
        ids = {there[each]["experiment_id"]: each for each in area(name) if each in there}
        others = [account for account in known.values() if account.name != name and not account.admin]
        for other in others:
            if taken := [ids[number] for number in ids if other.experiments.get(number) == "MANAGE"]:
                raise ServerError(f"the experiment {taken[0]!r} belongs to {other.name!r}: rename it.")


def _shared(shared: Sequence[str], known: dict[str, Account], there: dict[str, dict]) -> list[str]:
    """Return the ids of the experiments to read: those named, or those under `shared/` that no participant writes."""
    active = {name: each for name, each in there.items() if each["lifecycle_stage"] == "active"}
    if missing := [name for name in shared if name not in active]:
        raise ServerError(f"the server has no experiment {missing[0]!r} to share: make it first.")
    written = _written(account for account in known.values() if not account.admin)
    found = [each["experiment_id"] for name, each in active.items() if name.startswith(SHARED)]
    return [active[name]["experiment_id"] for name in shared] or [each for each in found if each not in written]


def _written(people: Iterable[Account]) -> set[str]:
    return {number for each in people for number, permission in each.experiments.items() if permission in WRITE}


def _experiment(settings: ServerSettings, secrets: Secrets, there: dict[str, dict], name: str) -> str:
    """Return the experiment's id; make it if it is missing, and bring it back if it was deleted."""
    found = there.get(name)
    if found is None:
        return _ask(settings, secrets, "POST", "2.0/mlflow/experiments/create", name=name)["experiment_id"]
    if found["lifecycle_stage"] != "active":
        number = found["experiment_id"]
        _ask(settings, secrets, "POST", "2.0/mlflow/experiments/restore", experiment_id=number)
    return found["experiment_id"]


def all_experiments(settings: ServerSettings, secrets: Secrets) -> dict[str, dict]:
    """Return all experiments by name, deleted ones too, page by page."""
    query, found = {"max_results": 1000, "view_type": "ALL"}, {}
    while True:
        page = _ask(settings, secrets, "POST", "2.0/mlflow/experiments/search", **query)
        found |= {each["name"]: each for each in page.get("experiments", [])}
        if not (token := page.get("next_page_token")):
            return found
        query["page_token"] = token


def _granted(user: dict) -> dict[str, str]:
    grants = [grant for role in user["roles"] for grant in role["permissions"]]
    return {
        grant["resource_pattern"]: grant["permission"] for grant in grants if grant["resource_type"] == "experiment"
    }


def _grant(settings: ServerSettings, secrets: Secrets, name: str, experiment_id: str, permission: str) -> None:
    target = {"resource_type": "experiment", "resource_id": experiment_id, "permission": permission}
    _ask(settings, secrets, "POST", "3.0/mlflow/users/permissions/grant", username=name, **target)


def _require(settings: ServerSettings, secrets: Secrets, name: str) -> None:
    people = [account.name for account in accounts(settings, secrets).values() if not account.admin]
    if name not in people:
        raise ServerError(f"there is no participant {name!r}; there are: {', '.join(sorted(people)) or 'none'}.")


def _ask(settings: ServerSettings, secrets: Secrets, method: str, route: str, **body: object) -> dict:
    """Send a request as the administrator and return the answer."""
    if not settings.accounts:
        raise ServerError("the profile local has no accounts: use --profile workshop, as for `start`.")
    answer = call(settings, secrets, method, f"/api/{route}", json=body)
    if answer.status_code == 401:
        raise ServerError(
            f"{settings.url} refuses the administrator's password: set MLFLOW_DEMO_SERVER_ADMIN_PASSWORD as for the "
            "first `start`."
        )
    if not answer.ok:
        raise ServerError(f"{settings.url} refuses {route} ({answer.status_code}: {answer.text[:200]}): fix that.")
    return answer.json() if answer.content else {}
