"""Who has done what: finished runs of each lesson by participant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from demo_lib.batch import lessons

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

from server.client import as_admin
from server.participants import WRITE, Account, accounts, all_experiments
from server.settings import Secrets, ServerSettings

PAGE = 5000  # runs: the store sorts all of them again for each page


def progress(settings: ServerSettings, secrets: Secrets) -> pd.DataFrame:
    """Return the number of finished runs by participant and lesson, and the time (UTC) when a run last began or ended.

    A run counts for the person in whose area it is, if that person was granted to write there and nobody else manages
    it. What a run says of itself, such as the tag `mlflow.user`, is not looked at: anyone can set it.

    Raises:
        ServerError: the server does not answer, has no accounts or refuses the administrator.
    """
    people = sorted(
        (each for each in accounts(settings, secrets).values() if not each.admin), key=lambda each: each.name
    )
    owners = _owners(people, all_experiments(settings, secrets))
    finished, last = Counter(), Counter()
    with as_admin(settings, secrets):
        for run in _runs(list(owners)):
            person, lesson = owners[run.info.experiment_id]
            finished[person, lesson] += run.info.status == "FINISHED"
            last[person] = max(last[person], run.info.start_time, run.info.end_time or 0)
    names = pd.Index([each.name for each in people], name="name")
    counts = {path.stem: [finished[name, path.stem] for name in names] for path in lessons()}
    times = pd.Series([last[name] or None for name in names], names, dtype="Int64")
    return pd.DataFrame(counts, names).assign(last_activity=pd.to_datetime(times, unit="ms", utc=True))


def _owners(people: Sequence[Account], there: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """Return person and lesson by the experiment's id."""
    managers: dict[str, set[str]] = {}
    for person in people:
        for number, permission in person.experiments.items():
            if permission == "MANAGE":
                managers.setdefault(number, set()).add(person.name)
    found = {}
    for person in people:
        for lesson in (path.stem for path in lessons()):
            number = there.get(f"{person.name}/{lesson}", {}).get("experiment_id", "")
            if person.experiments.get(number) in WRITE and managers.get(number, set()) <= {person.name}:
                found[number] = person.name, lesson
    return found


def _runs(experiment_ids: Sequence[str]) -> Iterator[Run]:
    client, token = MlflowClient(), None
    while experiment_ids:
        page = client.search_runs(experiment_ids, max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return
