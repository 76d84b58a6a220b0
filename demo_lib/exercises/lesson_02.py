"""What the exercises of lesson 02 expect: families of runs, pruned and interrupted trials."""

from collections import Counter
from itertools import pairwise

from demo_lib.exercises.evidence import PARENT, Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, best_and_others, question

from mlflow.entities import Run


def _orphans(parent: Run, evidence: Evidence) -> list[Run]:
    """Return runs without parent and without children that began while this one ran."""
    end = parent.info.end_time or parent.info.start_time
    return [
        run
        for run in evidence.runs
        if PARENT not in run.data.tags
        and run.info.run_id != parent.info.run_id
        and parent.info.start_time <= run.info.start_time <= end
    ]


@exercise("02.1", "six trials, two at a time", attempts=Evidence.tops)
def six_trials(run: Run, evidence: Evidence) -> Expectations:
    """Judge the parent run of a study of six trials."""
    above = run.data.tags.get(PARENT)
    yield not above, f"{named(run)} is itself nested in a run: tag the parent, the run of the study."
    children, orphans = evidence.children(run), _orphans(run, evidence)
    if not children and run.info.status == "FAILED":
        yield (
            False,
            f"{named(run)} is FAILED and has no children: `start_run` refuses a second open run unless it gets "
            "`nested=True`. In threads it needs `parent_run_id`, too.",
        )
    stray = [each for each in orphans if each.info.status == "RUNNING"]
    yield (
        not stray,
        f"{stray and named(stray[0])} has no parent, began while {named(run)} was open, and is still RUNNING: "
        "something was logged before `start_run`. Call `train` inside of the child's `with` block.",
    )
    yield (
        bool(children) or not orphans,
        f"{named(run)} has no children, but {counted(len(orphans), 'run')} without a parent began at the same time: in "
        "another thread, `nested=True` does not find the parent. Give `start_run` its `parent_run_id`.",
    )
    yield (
        len(children) == 6,
        f"{named(run)} has {counted(len(children), 'child', 'children')}: six trials are asked for.",
    )
    yield finished(run)
    late = [child for child in children if child.info.start_time > run.info.end_time]
    yield (
        not late,
        f"{counted(len(late), 'child', 'children')} of {named(run)} began after it had ended, the first "
        f"{(late[0].info.start_time - run.info.end_time) / 1000 if late else 0:.1f} s later: call `optimize` inside of "
        "the parent's `with` block.",
    )
    for child in children:
        points = evidence.history(child, "val_accuracy")
        steps = [point.step for point in points]
        yield (
            len(set(steps)) == 3,
            f"{named(child)}, a child of {named(run)}, has `val_accuracy` at {len(set(steps))} of 3 epochs "
            f"(steps {listed(steps)}).",
        )
        yield finished(child)
    ends = sorted((child.info.start_time, child.info.end_time) for child in children)
    yield (
        any(start < end for (_, end), (start, _) in pairwise(ends)),
        f"the children of {named(run)} ran one after the other: `n_jobs=2` lets two run at once.",
    )
    return (
        "Six trials under one parent, two at a time, each with three accuracies. In the list of runs, unfold the "
        "parent: whose accuracy is the highest?"
    )


@exercise("02.2", "stop bad trials, and name the winner", attempts=Evidence.tops)
def name_the_winner(run: Run, evidence: Evidence) -> Expectations:
    """Judge the parent run of a study with a pruner."""
    children = evidence.children(run)
    yield (
        len(children) >= 8,
        f"{named(run)} has {counted(len(children), 'child', 'children')}: eight trials are asked for.",
    )
    epochs = {child.info.run_id: len(evidence.history(child, "val_accuracy")) for child in children}
    longest = max(epochs.values())
    steps = next(
        [point.step for point in evidence.history(child, "val_accuracy")]
        for child in children
        if epochs[child.info.run_id] == longest
    )
    yield (
        not steps or steps == [*range(1, longest + 1)],
        f"the children of {named(run)} have `val_accuracy` at steps {listed(steps)}: the step is the epoch, from 1 on.",
    )
    yield longest > 1, f"the children of {named(run)} have {longest} values of `val_accuracy`: log one each epoch."
    short = [child for child in children if epochs[child.info.run_id] < longest]
    yield bool(short), f"every child of {named(run)} has all {longest} epochs: no trial was pruned."
    for status, why in {
        "FAILED": '`TrialPruned` left its `with` block. End the run by `mlflow.end_run("KILLED")` before you raise it',
        "FINISHED": 'as if it were done. End the run by `mlflow.end_run("KILLED")`, then raise `TrialPruned`',
        "RUNNING": "it was never ended",
    }.items():
        wrong = [child for child in short if child.info.status == status]
        what = f"{named(wrong[0])} has {epochs[wrong[0].info.run_id]} of {longest} epochs and is" if wrong else ""
        yield not wrong, f"{what} {status}: {why}."
    yield finished(run)
    whole = [child for child in children if child.info.status == "FINISHED"]
    yield bool(whole), f"no child of {named(run)} is FINISHED: some trials must run to the end."
    accuracy = {child.info.run_id: child.data.metrics.get("val_accuracy", 0) for child in children}
    best, given = max(accuracy[child.info.run_id] for child in whole), run.data.tags.get("best_run_id")
    as_param = " It is a parameter there, and a parameter can't change" if "best_run_id" in run.data.params else ""
    yield given is not None, f"{named(run)} has no tag `best_run_id`.{as_param or ' The winner belongs on the parent'}."
    other = next((child for child in children if given in (child.info.run_name, child.data.params.get("number"))), None)
    yield (
        given in {child.info.run_id for child in children},
        f"{named(run)} has `best_run_id = {given}`: no child has this id"
        + (f", though {named(other)} may be meant. The id is `run.info.run_id`" if other else "")
        + ".",
    )
    yield (
        accuracy.get(given) == best,
        f"{named(run)} names a child with `val_accuracy` {accuracy.get(given, 0):.3f} as the winner; among those that "
        f"ran to the end the best has {best:.3f}.",
    )
    return (
        f"{counted(len(short), 'trial')} of {len(children)} pruned and KILLED, and the parent names the winner, with "
        f"{best:.3f}. Lesson 02 puts the study's plots beside it."
    )


@exercise("02.3", "interrupted, and finished", attempts=Evidence.tops)
def interrupted_and_finished(run: Run, evidence: Evidence) -> Expectations:
    """Judge the parent run of a study that went on after an interruption."""

    def children_of(parent: Run) -> str:
        return counted(len(evidence.children(parent)), "child", "children")

    children = evidence.children(run)
    yield bool(children), f"{named(run)} has no children."
    numbers = [child.data.params.get("number", "") for child in children]
    yield (
        all(each.isdecimal() for each in numbers),
        f"a child of {named(run)} has no parameter `number`, that of its trial.",
    )
    twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
    yield (
        not twice,
        f"{named(run)} has trial {listed(twice)} twice: the study began anew. It goes on only if `create_study` gets "
        "the same `storage` and name, and `load_if_exists=True`.",
    )

    def other_part(other: Run) -> bool:
        """Whether the other run has trials, and none that this one has."""
        found = {child.data.params.get("number") for child in evidence.children(other)}
        return other.info.run_id != run.info.run_id and bool(found) and not found & {*numbers}

    parts = [each for each in evidence.tagged("02.3") if other_part(each)]
    killed = [child for child in children if child.info.status == "KILLED"]
    done = [child for child in children if child.info.status == "FINISHED"]
    whole = bool(killed) and len(done) >= 5
    yield (
        whole or not parts,
        f"{named(run)} has {children_of(run)}, and {parts and named(parts[0])} has {parts and children_of(parts[0])}: "
        "the study has two parents. Open the first parent again, with `start_run(run_id=...)`.",
    )
    failed = [child for child in children if child.info.status == "FAILED"]
    yield (
        bool(killed),
        f"{named(run)} has no KILLED child"
        + (
            f", but {named(failed[0])} is FAILED: add `truthful_status()` to the child's `with`."
            if failed
            else ": interrupt the study in a trial."
        ),
    )
    yield len(done) >= 5, f"{named(run)} has {len(done)} FINISHED children: the study goes on until there are five."
    yield (
        run.info.status == "FINISHED",
        f"{named(run)} is {run.info.status}: open it again for the rest, then its `with` block ends it FINISHED.",
    )
    return (
        f"{len(done)} trials done and {len(killed)} interrupted, all under one parent. `tune` of demo_lib does the "
        "same by the study's name: `python -m demo_lib tune --study NAME`, twice."
    )


@question("02")
def _own_winner(evidence: Evidence) -> Question:
    """Ask about the learner's latest study that has a winner."""
    known = evidence.runs_of("02_tune_with_nested_runs") + evidence.runs
    families: dict[str, dict[str, float]] = {run.info.run_id: {} for run in known}
    for run in known:
        if run.info.status == "FINISHED" and (above := run.data.tags.get(PARENT)) in families:
            families[above][run.info.run_name] = run.data.metrics.get("val_accuracy", 0.0)
    for parent in known:
        if ranked := best_and_others(families[parent.info.run_id]):
            (best, accuracy), others = ranked
            return Question(
                f"Which trial of your study `{parent.info.run_name}` has the highest `val_accuracy`?",
                f"`{best}`",
                f"It has {accuracy:.3f}.",
                {f"`{name}`": f"It has {value:.3f}, and one of the others has more." for name, value in others},
            )
    return Question(
        "A study's best trial has `val_accuracy` 0.842 on 166 images, the next one 0.836. Which is better?",
        "nobody can tell from this",
        "On so few images one standard error is nearly three points.",
        {
            "the first, as 0.842 is more": "0.006 of 166 images is one image.",
            "the second, as it may overfit less": "Nothing here says so.",
            "the one with the lower trial number": "The number says only which was tried earlier.",
        },
    )


@question("02")
def _order(evidence: Evidence) -> Question:
    return Question(
        "A trial is to be pruned. What comes first?",
        '`mlflow.end_run("KILLED")`, then `raise optuna.TrialPruned`',
        "A run that is closed already keeps its status when the exception leaves the block.",
        {
            '`raise optuna.TrialPruned`, then `mlflow.end_run("KILLED")`': "What follows `raise` is never reached.",
            "only `raise optuna.TrialPruned`": "Then the exception leaves the block and MLflow marks the run FAILED.",
            'only `mlflow.end_run("KILLED")`': "Then the training goes on, and logs into another run.",
        },
    )


@question("02")
def _threads(evidence: Evidence) -> Question:
    return Question(
        "With `n_jobs=2` a study's children have no parent. What is missing?",
        "`parent_run_id=` in `start_run`",
        "A thread does not see which run is open in another one, so it must be told.",
        {
            "`nested=True` in `start_run`": "It allows a run inside an open run. But the thread sees no open run.",
            "a storage for the study": "That lets a study go on later. It knows nothing of runs.",
            "a run name for each trial": "Names do not make families: the tag `mlflow.parentRunId` does.",
        },
    )
