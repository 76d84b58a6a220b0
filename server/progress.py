"""Who has done what: finished and failed runs of the lessons by participant."""

from collections import Counter
from time import time

from demo_lib.config import lessons

import mlflow
import pandas as pd

from server.client import as_admin
from server.participants import experiments, participants
from server.settings import ServerSettings

MANY = 10**9  # runs: its default would leave some out
LEFT = 3600_000  # milliseconds after which a run that has not ended counts as left: a lesson takes minutes


def progress(settings: ServerSettings) -> pd.DataFrame:
    """Return the number of finished runs by participant and lesson, of failed ones, and the last activity (UTC).

    Failed are the lessons' runs that ended FAILED or KILLED, but for pruned trials, and those that began over an hour
    ago and have not ended. The last activity is when a run last began or ended.

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
    finished, failed, last, now = Counter(), Counter(), Counter(), 1000 * time()
    with as_admin(settings):
        for run in mlflow.search_runs(list(owners), max_results=MANY, output_format="list") if owners else ():
            person, lesson = owners[run.info.experiment_id]
            finished[person, lesson] += run.info.status == "FINISHED"
            left = run.info.status == "RUNNING" and now - run.info.start_time > LEFT
            ended = run.info.status in ("FAILED", "KILLED") and run.data.tags.get("trial_state") != "PRUNED"
            failed[person] += left or ended
            last[person] = max(last[person], run.info.start_time, run.info.end_time or 0)
    names = pd.Index(list(people), name="name")
    counts = {title: [finished[name, title] for name in names] for title in titles}
    counts["failed"] = [failed[name] for name in names]
    times = pd.Series([last[name] or None for name in names], names, dtype="Int64")
    return pd.DataFrame(counts, names).assign(last_activity=pd.to_datetime(times, unit="ms", utc=True))
