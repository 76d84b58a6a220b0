"""Who has run and done what: the lessons' runs and the answers to the exercises, by participant."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import time
from typing import Any

from demo_lib.config import DemoError, lessons, write_file
from demo_lib.exercises import EXERCISES, check_all
from demo_lib.exercises.evidence import EXPERIMENT, Evidence
from demo_lib.exercises.hunts import EXPERIMENT as HUNT
from demo_lib.exercises.judging import soon_given_up

import pandas as pd
from mlflow import MlflowException
from mlflow.entities import Run
from requests import RequestException

from server.client import as_admin
from server.participants import experiments, participants
from server.settings import ServerSettings

DAY = 24 * 3600_000  # milliseconds by which a person's clock may be ahead
LEFT = 60  # minutes after which a run that has not ended counts as left: a lesson takes minutes
THREADS = 4  # people asked about at once; with more, two cores were no faster


def progress(settings: ServerSettings) -> pd.DataFrame:
    """Return a row for each participant, first those who have been stuck longest.

    Columns: the lessons' names, with the number of finished runs; `ran`, the number of lessons that have one; `failed`;
    the exercises' numbers, with the answers of `demo_lib.exercises.check`; how many are `passed`, `tried` and
    `not_begun`; `stuck_at`, the exercise begun last of those that are tried and not passed, and `stuck`, the minutes
    since its first attempt; `idle`, the minutes since the last sign of life; `last_activity`, when that was (UTC).

    A finished run says that a lesson ran, perhaps by `demo_lib run`; only a passed exercise says that somebody worked.
    Failed are the lessons' runs that ended FAILED or KILLED, but for pruned trials, and those that began over an hour
    ago and have not ended. A sign of life is that a run began or ended.

    What is in a person's area counts for that person, if granted to write there. What a run says of itself, such as the
    tag `mlflow.user`, is not looked at: anyone can set it.
    """
    people, there = participants(settings), experiments(settings)
    areas = {
        person: {
            name.partition("/")[2]: number
            for name, number in there.items()
            if name.startswith(f"{person}/") and granted.get(number) in ("EDIT", "MANAGE")
        }
        for person, granted in people.items()
    }
    with as_admin(settings), soon_given_up(), ThreadPoolExecutor(THREADS) as pool:
        try:
            rows = list(pool.map(_row, areas.values()))
        except (MlflowException, RequestException) as error:
            raise DemoError(f"{settings.url} stopped answering ({str(error)[:100]}): look again later.") from None
    table = pd.DataFrame(rows, pd.Index(list(areas), name="name"), columns=None if rows else list(_row({})))
    whole = dict.fromkeys(("stuck", "idle"), "Int64")
    table["last_activity"] = pd.to_datetime(table["last_activity"].astype("Int64"), unit="ms", utc=True)
    return table.astype(whole).sort_values(["stuck", "passed"], ascending=[False, True], kind="stable")


def as_text(table: pd.DataFrame, anonymous: bool = False) -> str:
    """Return the table as a terminal of 80 columns can show it, without the lessons' and the exercises' columns."""
    if table.empty:
        return "no participants yet."
    shown = pd.DataFrame(
        {
            "name": ["".join(sign if sign.isprintable() else "?" for sign in name) for name in table.index],
            "passed": table.passed.to_numpy(),
            "tried": table.tried.to_numpy(),
            "not begun": table.not_begun.to_numpy(),
            "stuck at": [
                f"{at}, {_span(since)}" if at else "-" for at, since in zip(table.stuck_at, table.stuck, strict=True)
            ],
            "idle": ["-" if pd.isna(each) else _span(each) for each in table.idle],
            "ran": table.ran.to_numpy(),
            "failed": table.failed.to_numpy(),
        }
    )
    return shown.drop(columns="name" if anonymous else []).to_string(index=False)


def write_csv(table: pd.DataFrame, path: Path, anonymous: bool = False) -> None:
    """Write all columns to the file, with or without the names; a place that can't be written is a `DemoError`."""
    write_file(path, table.to_csv(index=not anonymous).encode())


def _row(area: dict[str, str]) -> dict[str, Any]:
    """Return a person's row; the area has the ids of the person's experiments by name."""
    evidence, titles, now = Evidence(area.get, own=False), [path.stem for path in lessons()], 1000 * time()
    everything = evidence.runs_by_experiment([*titles, EXPERIMENT, HUNT])  # one request, not one each
    runs = {title: everything[title] for title in titles}
    replies = check_all(EXERCISES, evidence)
    finished = {title: sum(run.info.status == "FINISHED" for run in found) for title, found in runs.items()}
    answers = [reply.answer for reply in replies]
    tried = [reply for reply in replies if reply.answer == "not yet"]
    stuck = max(tried, key=lambda reply: reply.first, default=None)
    ever = [*(run for found in runs.values() for run in found), *evidence.runs]
    times = (each for run in ever for each in (run.info.start_time, run.info.end_time))
    last = max((each for each in times if each and 0 < each < now + DAY), default=None)  # people can set any time
    return {
        **finished,
        "ran": sum(count > 0 for count in finished.values()),
        "failed": sum(_went_wrong(run, now) for found in runs.values() for run in found),
        **{reply.number: reply.answer for reply in replies},
        "passed": answers.count("passed"),
        "tried": len(tried),
        "not_begun": answers.count("not attempted"),
        "stuck_at": stuck.number if stuck else "",
        "stuck": stuck and _minutes(stuck.first, now),
        "idle": last and _minutes(last, now),
        "last_activity": last,
    }


def _went_wrong(run: Run, now: float) -> bool:
    left = run.info.status == "RUNNING" and _minutes(run.info.start_time, now) >= LEFT
    return left or (run.info.status in ("FAILED", "KILLED") and run.data.tags.get("trial_state") != "PRUNED")


def _span(minutes: int) -> str:
    """Return the time in the largest unit that it has two of."""
    for unit, size in {"d": 1440, "h": 60}.items():
        if minutes >= 2 * size:
            return f"{minutes // size} {unit}"
    return f"{minutes} min"


def _minutes(then: int, now: float) -> int:
    return max(0, int(now - max(then, 0)) // 60_000)
