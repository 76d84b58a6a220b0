"""What the exercises of lesson 08 expect: copies of runs, with their models and their families."""

from collections.abc import Iterable

from demo_lib.exercises.evidence import PARENT, Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run

ORIGIN = "copied_from"
Point = tuple[str, int, int, float]


def _original(run: Run, evidence: Evidence) -> Run | None:
    """Return the run of which this one says that it is a copy, if it is in the same experiment."""
    found = evidence.run(run.data.tags.get(ORIGIN))
    return found if found and found.info.experiment_id == run.info.experiment_id else None


def _points(run: Run, evidence: Evidence) -> set[Point]:
    """Return all points of the run's metrics: name, step, time and value."""
    return {
        (name, point.step, point.timestamp, point.value)
        for name in run.data.metrics
        for point in evidence.history(run, name)
    }


def _is_copy(run: Run, number: str, evidence: Evidence) -> Expectations:
    """Expect that the run says of which run of the setup it is a copy."""
    given = run.data.tags.get(ORIGIN)
    yield given is not None, f"{named(run)} has no tag `{ORIGIN}`, with the id of the run that it is a copy of."
    first = _original(run, evidence)
    yield (
        first is not None and first.info.run_id != run.info.run_id,
        f"{named(run)} has `{ORIGIN} = {given[:12] if given else ''}`: no other run of this experiment has that id.",
    )
    yield (
        first.data.tags.get("setup") == number and ORIGIN not in first.data.tags,
        f"{named(run)} is a copy of {named(first)}: copy the run that the setup cell made.",
    )


def _same_record(run: Run, first: Run, evidence: Evidence) -> Expectations:
    """Expect the parameters and every point of the first run."""
    lost = [name for name, value in first.data.params.items() if run.data.params.get(name) != value]
    yield (
        not lost,
        f"{named(run)} lacks parameters of {named(first)}, or has other values of them: "
        f"{listed(f'`{each}`' for each in lost)}.",
    )
    before, after = (_points(each, evidence) for each in (first, run))
    counts = f"{named(run)} has {counted(len(after), 'point')} of its metrics, {named(first)} has {len(before)}"

    def lacks(*kept: int) -> bool:
        """Whether something is missing even if only these parts of a point are looked at."""
        return bool({tuple(p[i] for i in kept) for p in before} - {tuple(p[i] for i in kept) for p in after})

    names = sorted({name for name, *_ in before} - {name for name, *_ in after})
    yield not names, f"{counts}: it has no {listed(f'`{each}`' for each in names)}."
    at_zero = {step for _, step, _, _ in after} == {0} != {step for _, step, _, _ in before}
    yield not at_zero, f"{counts}, all at step 0: give each point its `step`."
    latest = "`run.data.metrics` has only the latest values, `get_metric_history` has all"
    yield len(after) >= len(before), f"{counts}: {latest}."
    yield not lacks(0, 3), f"{counts}, but some values are not the same."
    yield not lacks(0, 1, 3), f"{named(run)} has the values of {named(first)}, but at other steps."
    yield (
        not lacks(0, 1, 2, 3),
        f"{named(run)} has all values at their steps, but with the time of the copying: a `Metric` has a `timestamp`.",
    )


@exercise("08.1", "move a run with its model")
def move_a_run(run: Run, evidence: Evidence) -> Expectations:
    """Judge a copy of the setup's run."""
    yield from _is_copy(run, "08.1", evidence)
    first = _original(run, evidence)
    yield from _same_record(run, first, evidence)
    data = [{(each.dataset.name, each.dataset.digest) for each in _datasets(each)} for each in (first, run)]
    yield (
        data[0] <= data[1],
        f"{named(run)} does not name its data: {named(first)} has {counted(len(_datasets(first)), 'input')}, for "
        "`log_inputs`.",
    )
    files = [{each.path for each in evidence.files(each)} for each in (first, run)]
    lost = sorted(files[0] - files[1])
    yield not lost, f"{named(run)} has no {listed(f'`{each}`' for each in lost)}, a file of {named(first)}."
    models = evidence.models(run)
    foreign = [each.model_id for each in (run.outputs.model_outputs if run.outputs else ())]
    why = "it names the model of another run as its output, which stays there" if foreign else "files are no model"
    yield (
        bool(models),
        f"{named(run)} has no model of its own: {why}. Load the model, and log it again in the copy.",
    )
    yield finished(run)
    return (
        f"A copy with {counted(len(first.data.params), 'parameter')}, {len(_points(first, evidence))} points and the "
        f"model `{models[0].name}`. Its id is new, and `{ORIGIN}` leads to the old one."
    )


def _datasets(run: Run) -> list:
    return run.inputs.dataset_inputs if run.inputs else []


def _copies(of: Iterable[Run], evidence: Evidence) -> dict[str, list[Run]]:
    """Return by the original's id the runs that say they are copies of it."""
    found: dict[str, list[Run]] = {run.info.run_id: [] for run in of}
    for run in evidence.runs:
        if (origin := run.data.tags.get(ORIGIN)) in found and origin != run.info.run_id:
            found[origin].append(run)
    return found


@exercise("08.2", "move a family", attempts=Evidence.tops)
def move_a_family(run: Run, evidence: Evidence) -> Expectations:
    """Judge a copy of the setup's parent run, and those of its children."""
    yield from _is_copy(run, "08.2", evidence)
    first = _original(run, evidence)
    above = first.data.tags.get(PARENT)
    yield not above, f"{named(run)} is a copy of a child, {named(first)}: the tag belongs on the copy of the parent."
    yield from _same_record(run, first, evidence)
    originals = [each for each in evidence.children(first) if ORIGIN not in each.data.tags]
    here = [each.data.tags.get(ORIGIN) for each in evidence.children(run)]
    lost = [each for each in originals if each.info.run_id not in here]
    elsewhere = [copy for copies in _copies(lost, evidence).values() for copy in copies]
    old = [each for each in elsewhere if each.data.tags.get(PARENT) == first.info.run_id]
    alone = [each for each in elsewhere if PARENT not in each.data.tags]
    have = f"{named(run)} has {counted(len(here), 'child', 'children')}"
    yield (
        not old,
        f"{have}: {named(old[0]) if old else ''}, a copy of a child, still names the old parent in `{PARENT}`. Give it "
        "the id of the parent's copy.",
    )
    yield (
        not alone,
        f"{have}: {named(alone[0]) if alone else ''}, a copy of a child, has no tag `{PARENT}`. Give it the id of the "
        "parent's copy.",
    )
    nameless = [each for each in evidence.children(run) if ORIGIN not in each.data.tags]
    yield not nameless, f"{named(nameless[0]) if nameless else ''}, a child of {named(run)}, has no tag `{ORIGIN}`."
    yield (
        not lost,
        f"{have}, and {named(first)} has {len(originals)}: there is no copy of "
        f"{listed(each.info.run_name for each in lost)}.",
    )
    twice = sorted({origin for origin in here if here.count(origin) > 1})
    yield not twice, f"{have}: {counted(len(twice), 'run')} of {len(originals)} was copied more than once."
    known = {each.info.run_id: each for each in originals}
    for child in evidence.children(run):
        if original := known.get(child.data.tags[ORIGIN]):
            yield from _same_record(child, original, evidence)
    yield finished(run)
    return (
        f"A parent and {counted(len(here), 'child', 'children')}, each with all its points, and the children name the "
        "new parent. In the list of runs, unfold it: which child was the best?"
    )


@question("08")
def _own_copy(evidence: Evidence) -> Question:
    """Ask about the learner's own copy."""
    copy = next((run for run in evidence.tagged("08.1") if _original(run, evidence)), None)
    name = copy.info.run_name if copy else "shy-owl-7"
    origin = f"is a copy of run {copy.data.tags[ORIGIN][:6]}" if copy else "is copied to a server"
    return Question(
        f"Run `{name}` {origin}. Which of these is always new in a copy?",
        "its id",
        "The store makes a new one. A tag such as `copied_from` keeps the old one.",
        {
            "its start time": "`create_run` takes the start time as an argument.",
            "its name": "`create_run` takes a name as an argument.",
            "its metrics' steps": "Each point of a metric is logged with its step.",
        },
    )


@question("08")
def _edit(evidence: Evidence) -> Question:
    return Question(
        "Ana has `EDIT` for the experiment `both/work`, where Ben keeps his runs. What can she do there?",
        "change the metrics of Ben's runs",
        "`EDIT` is for the whole experiment, whoever made a run. So each person needs one of their own.",
        {
            "delete Ben's runs": "Deleting takes `MANAGE`.",
            "change only runs of her own": "Permissions are granted for experiments and not for runs.",
            "read Ben's runs, and no more": "That would be `READ`.",
        },
    )


@question("08")
def _password(evidence: Evidence) -> Question:
    return Question(
        "Where does a password for the tracking server belong?",
        "in the environment of the program that needs it",
        "Others can't see it there, and it is saved with nothing.",
        {
            "on the command line": "Every user of the machine can see command lines.",
            "in a notebook's first cell": "The notebook is saved, copied and shared with it.",
            "in a tag of the run": "Everyone who may read the run reads its tags.",
        },
    )
