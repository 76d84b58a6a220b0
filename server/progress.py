"""Who has done what: finished runs of each lesson by participant."""

from collections import Counter

from demo_lib.config import lessons

import mlflow
import pandas as pd

from server.client import as_admin
from server.participants import experiments, participants
from server.settings import ServerSettings

MANY = 10**9  # runs: its default would leave some out


def progress(settings: ServerSettings) -> pd.DataFrame:
    """Return the number of finished runs by participant and lesson, and the time (UTC) when a run last began or ended.

    A run counts for the person in whose area it is, if that person was granted to write there. What a run says of
    itself, such as the tag `mlflow.user`, is not looked at: anyone can set it.
    """
    people, there = participants(settings), experiments(settings)
    titles, owners = [path.stem for path in lessons()], {}
    for person, granted in people.items():
        for title in titles:
            number = there.get(f"{person}/{title}")
            if granted.get(number) in ("EDIT", "MANAGE"):
                owners[number] = person, title
    finished, last = Counter(), Counter()
    with as_admin(settings):
        for run in mlflow.search_runs(list(owners), max_results=MANY, output_format="list") if owners else ():
            person, lesson = owners[run.info.experiment_id]
            finished[person, lesson] += run.info.status == "FINISHED"
            last[person] = max(last[person], run.info.start_time, run.info.end_time or 0)
    names = pd.Index(list(people), name="name")
    counts = {title: [finished[name, title] for name in names] for title in titles}
    times = pd.Series([last[name] or None for name in names], names, dtype="Int64")
    return pd.DataFrame(counts, names).assign(last_activity=pd.to_datetime(times, unit="ms", utc=True))
