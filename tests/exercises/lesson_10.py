"""Attempts at the exercises of lesson 10."""

import time

from demo_lib.store import own_name

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from tests.exercises.attempts import two_sittings, wrong

HERE = "host:machine:boot:namespace:1:1"
THERE = [HERE.replace(":1:1", f":{number}:1") for number in (2, 3)]
TAG = {"exercise": "10.1"}


def study(processes, winner=True, workers="0", after=False, tags=TAG):
    """Log a study's parent, and a child for each process named; `after` lets them run one after the other."""
    client, number = MlflowClient(), mlflow.get_experiment_by_name(own_name("exercises")).experiment_id
    now = round(1000 * time.time())
    own = {"study": "help-wanted", "workers": workers, "process": HERE} | tags
    parent = client.create_run(number, now, own, "help-wanted").info.run_id
    for trial, process in enumerate(processes):
        start = now + 1000 * (trial if after else trial // 2)
        nested = {"mlflow.parentRunId": parent, "process": process}
        child = client.create_run(number, start, nested, f"trial {trial}").info.run_id
        client.set_terminated(child, end_time=start + 900)
    if winner:
        client.set_tag(parent, "best_run_id", child)
    client.set_terminated(parent)
    return parent


@wrong("10.1", r"has no finished trial: nobody has joined the study `help-wanted` yet")
def only_tagged():
    study([], winner=False)


@wrong("10.1", r"one process did all 10 trials of run .*: start the second worker before the first one ends")
def one_worker():
    study(THERE[:1] * 10)


@wrong("10.1", r"the workers of run .* worked one after the other: start both, and only then wait for them")
def run_instead_of_popen():
    study(THERE[:1] * 5 + THERE[1:] * 5, after=True)


@wrong("10.1", r"the workers of run .* were started by `tune`, as its tag `workers = 2` says")
def two_workers_of_tune():
    study(THERE * 5, workers="2")


@wrong("10.1", r"has 4 finished trials of 10: let workers join again")
def interrupted():
    study(THERE * 2, winner=False)


@wrong("10.1", r"5 trials of run .* ran in the process of the parent run: do the trials by commands")
def joined_in_the_notebook():
    study([HERE, THERE[0]] * 5)


@wrong("10.1", r"has all 10 trials, but no winner: call `tune` with the same configuration once more")
def the_winner_forgotten():
    study(THERE * 5, winner=False)


@wrong("10.1", r"is not the parent run of a study: tag the run `parent` of the setup cell")
def a_run_of_their_own():
    with mlflow.start_run(tags=TAG):
        pass


@two_sittings("10.1")
def the_winner_tomorrow():
    parent = study(THERE * 5, winner=False, tags={})
    yield
    for name, value in (TAG | {"best_run_id": "any"}).items():
        MlflowClient().set_tag(parent, name, value)


def batch(jobs, tag="10.2", tagged_job=False):
    """Log a batch with a job for each entry, the statuses of its executions; return the parent's id."""
    client, name = MlflowClient(), own_name("batch")
    found = client.get_experiment_by_name(name)
    number = found.experiment_id if found else client.create_experiment(name)
    tags = {"exercise": tag} if tag else {}
    parent = client.create_run(number, tags={} if tagged_job else tags, run_name=f"batch of {len(jobs)}").info.run_id
    for statuses in jobs:
        nested = {"mlflow.parentRunId": parent} | (tags if tagged_job else {})
        job = client.create_run(number, tags=nested, run_name="batches images").info.run_id
        execute(job, statuses)
    client.set_terminated(parent, "FINISHED" if all(each[-1] == "FINISHED" for each in jobs) else "FAILED")
    return parent


def execute(job, statuses):
    client = MlflowClient()
    for status in statuses:
        error = [RunTag("error", "cell [3] failed with AssertionError: limit.txt allows 1000 images only")]
        now = round(1000 * time.time())
        client.log_batch(job, [Metric("seconds", 2.0, now, 0)], tags=error if status == "FAILED" else [])
        client.set_terminated(job, status)


GOOD, BAD, MENDED = ["FINISHED"], ["FAILED"], ["FAILED", "FINISHED"]


@wrong(
    "10.2", r"is FAILED: cell \[3\] failed with AssertionError: limit\.txt allows 1000 .* Remove the cause and resume"
)
def still_failed():
    batch([GOOD, GOOD, BAD, BAD])


@wrong("10.2", r"all 4 jobs of run .* were finished at once: this is a new batch")
def a_new_batch():
    batch([GOOD, GOOD, BAD, BAD], tag="")
    batch([GOOD] * 4)


@wrong("10.2", r"has 2 jobs: one batch of all 4 sets is asked for, which goes on")
def only_what_failed_as_a_new_batch():
    batch([GOOD] * 2)


@wrong("10.2", r"all 4 jobs of run .* were done twice: none was finished when the batch went on")
def a_limit_too_low_for_all():
    batch([MENDED] * 4)


@wrong("10.2", r"is one job of a batch: tag its parent, \w{6}")
def a_child_tagged():
    batch([GOOD, GOOD, MENDED, MENDED], tagged_job=True)


@two_sittings("10.2")
def resumed_tomorrow():
    parent = batch([GOOD, GOOD, BAD, BAD])
    yield
    client, number = MlflowClient(), MlflowClient().get_run(parent).info.experiment_id
    for job in client.search_runs([number], f"tags.mlflow.parentRunId = '{parent}' AND attributes.status = 'FAILED'"):
        execute(job.info.run_id, GOOD)
    client.set_terminated(parent, "FINISHED")
