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
        error = job.data.tags.get("error", "")[:200].rstrip(". ")
        yield (
            job.info.status == "FINISHED",
            f"job {named(job)} is {job.info.status}: {error or 'no error is noted'}. Remove the cause and resume batch "
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
        f"Two workers did the {number} trials of study `{name}`. How did each of them know which trial to do next?",
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
        "A worker needs 6 seconds to start, and a trial 2 seconds, alone or beside others. Two new workers compete "
        "with one process that has started already. With how many trials do they win?",
        "8",
        "One process needs 16 s, the workers 6 s and four times 2 s: 14 s. With 7 trials it is a tie.",
        {
            "3": "One process needs 6 s, and then the workers have just started.",
            "7": "One process needs 14 s, and so do the workers: one of them does four trials.",
            "with no number of trials": "The start is paid once, and each pair of trials wins 2 seconds.",
        },
    )


@question("10")
def _nothing_idle(evidence: Evidence) -> Question:
    return Question(
        "A study has 100 trials of a minute. Alone, each training keeps all 4 cores of your machine busy. What do 4 "
        "workers on this machine win?",
        "next to nothing",
        "They share the cores that one training used alone: four trials at once take four times as long each.",
        {
            "they are nearly 4 times faster": "So they would be if three of the four cores were idle before.",
            "they find a better winner": "At the same number of trials the sampler knows less, not more.",
            "nothing, as they need too long to start": "Of 100 minutes, some seconds don't matter here.",
        },
    )
