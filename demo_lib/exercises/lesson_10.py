"""What the exercises of lesson 10 expect: a study that workers joined, and a batch that went on."""

from itertools import combinations

from demo_lib.exercises.evidence import PARENT, Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question
from demo_lib.store import own_name

from mlflow.entities import Run

TRIALS, JOBS = 10, 4
BATCH = "batch"


def _process(run: Run) -> str:
    return run.data.tags.get("process", "")


def _overlap(one: Run, other: Run) -> bool:
    return one.info.start_time < other.info.end_time and other.info.start_time < one.info.end_time


@exercise("10.1", "two workers join", attempts=Evidence.tops)
def two_workers_join(run: Run, evidence: Evidence) -> Expectations:
    """Judge the parent run of a study that others have begun."""
    tags = run.data.tags
    yield (
        "study" in tags and PARENT not in tags,
        f"{named(run)} is not the parent run of a study: tag the run `parent` of the setup cell.",
    )
    done = [child for child in evidence.children(run) if child.info.status == "FINISHED"]
    yield bool(done), f"{named(run)} has no finished trial: nobody has joined the study `{tags['study']}` yet."
    yield (
        len(done) == TRIALS,
        f"{named(run)} has {counted(len(done), 'finished trial')} of {TRIALS}: let workers join again, the study goes "
        "on where it was.",
    )
    yield (
        tags.get("workers") == "0",
        f"the workers of {named(run)} were started by `tune`, as its tag `workers = {tags.get('workers')}` says: let "
        "them join by a command each, and keep `workers = 0`.",
    )
    processes = {_process(child) for child in done}
    here = [child for child in done if _process(child) == _process(run)]
    yield (
        not here,
        f"{counted(len(here), 'trial')} of {named(run)} ran in the process of the parent run: do the trials by "
        "commands, which are processes of their own.",
    )
    yield (
        len(processes) > 1,
        f"one process did all {TRIALS} trials of {named(run)}: start the second worker before the first one ends.",
    )
    yield (
        any(_overlap(one, other) for one, other in combinations(done, 2) if _process(one) != _process(other)),
        f"the workers of {named(run)} worked one after the other: start both, and only then wait for them.",
    )
    yield (
        "best_run_id" in tags,
        f"{named(run)} has all {TRIALS} trials, but no winner: call `tune` with the same configuration once more.",
    )
    yield finished(run)
    shares = sorted(sum(_process(child) == process for child in done) for process in processes)
    return (
        f"{len(processes)} workers did {listed(shares)} trials at the same time, and knew nothing of each other. On "
        "other machines the command would be the same."
    )


def _batches(evidence: Evidence, number: str) -> list[Run]:
    return [run for run in evidence.runs_of(BATCH) if run.data.tags.get("exercise", "").strip() == number]


def _missing(evidence: Evidence) -> str:
    tagged = "has the tag `exercise = 10.2`: give it to the batch's parent run, whose id is the batch's id"
    return f"no run of the experiment `{own_name(BATCH)}` {tagged}."


@exercise("10.2", "go on after a failure", attempts=_batches, missing=_missing)
def go_on_after_a_failure(run: Run, evidence: Evidence) -> Expectations:
    """Judge the parent run of a batch that failed in part."""
    tags = run.data.tags
    yield PARENT not in tags, f"{named(run)} is one job of a batch: tag its parent, {tags.get(PARENT, '')[:6]}."
    jobs = [each for each in evidence.runs_of(BATCH) if each.data.tags.get(PARENT) == run.info.run_id]
    yield (
        len(jobs) == JOBS,
        f"{named(run)} has {counted(len(jobs), 'job')}: one batch of all {JOBS} sets is asked for, which goes on.",
    )
    for job in jobs:
        error = job.data.tags.get("error", "")[:200]
        yield (
            job.info.status == "FINISHED",
            f"job {named(job)} is {job.info.status}: {error or 'no error is noted'} Remove the cause and resume batch "
            f"{run.info.run_id[:6]}.",
        )
    repeated = [job for job in jobs if len(evidence.history(job, "seconds")) > 1]
    yield (
        bool(repeated),
        f"all {JOBS} jobs of {named(run)} were finished at once: this is a new batch, begun when the cause was gone. "
        "Let the first one go on, by its id.",
    )
    yield (
        len(repeated) < JOBS,
        f"all {JOBS} jobs of {named(run)} were done twice: none was finished when the batch went on.",
    )
    yield finished(run)
    return (
        f"{counted(len(repeated), 'job')} failed and were done again, in the same child runs; the other "
        f"{JOBS - len(repeated)} were not. Whoever opens the parent sees one batch, and it is FINISHED."
    )


@question("10")
def _who_knows(evidence: Evidence) -> Question:
    """Ask about the learner's own study."""
    studies = [run for run in evidence.tagged("10.1") if "study" in run.data.tags]
    name, number = "night", TRIALS
    if studies:
        name, number = studies[0].data.tags["study"], len(evidence.children(studies[0])) or number
    return Question(
        f"Two workers did the {number} trials of study `{name}`. How did each of them know which trial was the next?",
        "from the study in its storage, which both asked",
        "The storage has all trials. It is all that the workers share, with the tracking store.",
        {
            "the first worker told the second": "They do not know of each other.",
            "the parent run keeps a list of trials to do": "MLflow only records what was done.",
            "each had its half of the trials from the beginning": "Then a dead worker's half would stay undone.",
        },
    )


@question("10")
def _when_it_pays(evidence: Evidence) -> Question:
    return Question(
        "A process needs 6 seconds to start, a trial 2 seconds, alone or beside others. One process that has started "
        "already, or two new workers: from how many trials on are the workers faster?",
        "more than 6",
        "One process needs 2 s for each trial, the workers 6 s and then 1 s for each: 2n is more than 6 + n from 7 on.",
        {
            "more than 2": "With 3 trials, one process needs 6 s, and the workers have just started.",
            "more than 12": "With 12 trials, one process needs 24 s, the workers 6 + 12 = 18 s.",
            "they never are": "The start is paid once; each trial then wins a second.",
        },
    )


@question("10")
def _dead_elsewhere(evidence: Evidence) -> Question:
    return Question(
        "A worker on another machine loses its power in the middle of a trial. What happens to this trial?",
        "after some seconds without a heartbeat it is given up, and tried again by another worker",
        "A machine without power can report nothing. That nothing comes is what the others see.",
        {
            "the worker reports that it died": "It can't: it has no power.",
            "it stays RUNNING until somebody closes it": "So it would be without heartbeats.",
            "the study fails": "A study does not depend on any of its workers.",
        },
    )
