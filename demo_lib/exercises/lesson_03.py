"""What the exercises of lesson 03 expect: a shortlist by query, and a run brought back."""

import math
from collections import defaultdict
from collections.abc import Iterable

from demo_lib.exercises.evidence import PARENT, Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run

LEAST, WIDEST = 0.75, 8  # what the shortlist asks for: more than this accuracy, at most so many channels
LOSSES = ("train_loss", "val_loss", "val_accuracy")
CAUSES = ("cpu_threads", "device", "torch_version", "data_digest")  # tags that say why values may differ


def _families(evidence: Evidence, number: str) -> list[list[Run]]:
    """Return the tagged runs of each family together; a parent belongs to its own family."""
    found = defaultdict(list)
    for run in evidence.tagged(number):
        found[run.data.tags.get(PARENT, run.info.run_id)].append(run)
    return list(found.values())


def _number(text: object) -> float:
    """Return the parameter as a number, NaN for what is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _accuracy(run: Run) -> float:
    return run.data.metrics.get("val_accuracy", math.nan)


def _some(runs: Iterable[Run], total: int) -> str:
    found = len(list(runs))
    return f"{found} of {counted(total, 'tagged run')} {'is' if found == 1 else 'are'}"


@exercise("03.1", "a shortlist by query", attempts=_families)
def a_shortlist(runs: list[Run], evidence: Evidence) -> Expectations:
    """Judge the tagged runs of one family: they are the shortlist."""
    tagged = {run.info.run_id for run in runs}
    parent = evidence.run(runs[0].data.tags.get(PARENT, runs[0].info.run_id))
    yield (
        parent is not None and parent.data.tags.get("setup") == "03.1",
        f"{named(runs[0])} is no trial of the study that the setup cell made: ask for the children of `parent`.",
    )
    away = 'Take wrong tags away with `client.delete_tag(run_id, "exercise")`'
    yield (
        parent.info.run_id not in tagged,
        f"{named(parent)} is tagged, and it is the parent: only trials are asked for, the runs that have its id in "
        f"the tag `{PARENT}`. {away}.",
    )
    bad = [run for run in runs if run.info.status != "FINISHED"]
    yield (
        not bad,
        f"{_some(bad, len(runs))} not FINISHED: {listed(f'{named(run)} is {run.info.status}' for run in bad[:3])}. Ask "
        f"for `attributes.status`. {away}.",
    )
    bad = [run for run in runs if not _number(run.data.params.get("channels")) <= WIDEST]
    yield (
        not bad,
        f"{_some(bad, len(runs))} too wide: {listed(f'{named(run)} has {_channels(run)}' for run in bad[:3])} channels."
        f" Parameters are text, and as text '16' comes before '8': make numbers of them first. {away}.",
    )
    bad = [run for run in runs if not _accuracy(run) > LEAST]
    yield (
        not bad,
        f"{_some(bad, len(runs))} not above {LEAST}: "
        f"{listed(f'{named(run)} has `val_accuracy` {_accuracy(run):.4g}' for run in bad[:3])}. {away}.",
    )
    children = evidence.children(parent)
    missing = [run for run in children if _belongs(run) and run.info.run_id not in tagged]
    yield (
        not missing,
        f"{counted(len(missing), 'run')} of the shortlist {'has' if len(missing) == 1 else 'have'} no tag: "
        f"{listed(f'one with {_accuracy(run):.4g} and {_channels(run)} channels' for run in missing[:3])}.",
    )
    return (
        f"Exactly the {len(runs)} of {len(children)} trials that were asked for. Type `tags.exercise = '03.1'` into "
        "the search field of the experiment's page: the tag is now a filter for everybody."
    )


def _belongs(run: Run) -> bool:
    return (
        run.info.status == "FINISHED" and _accuracy(run) > LEAST and _number(run.data.params.get("channels")) <= WIDEST
    )


def _channels(run: Run) -> str:
    return run.data.params.get("channels", "no number of")[:20]


@exercise("03.2", "the second best, again")
def the_second_best_again(run: Run, evidence: Evidence) -> Expectations:
    """Judge the copy of a run of the setup's family."""
    yield finished(run)
    given = run.data.tags.get("repeats")
    as_param = " It is a parameter there, which tells a choice: set the tag" if "repeats" in run.data.params else ""
    yield given is not None, f"{named(run)} has no tag `repeats`, the id of the run that it repeats.{as_param}"
    original = evidence.run(given)
    meant = next((each for each in evidence.runs if given in (each.info.run_name, each.info.run_id[:8])), None)
    yield (
        original is not None,
        f"{named(run)} has `repeats = {given[:40]}`: no run has this id"
        + (f", though {named(meant)} may be meant. The id is `run.info.run_id`." if meant else "."),
    )
    yield (
        original.info.run_id != run.info.run_id,
        f"{named(run)} says that it repeats itself: the copy is a new run, which `train` makes.",
    )
    parent = evidence.run(original.data.tags.get(PARENT))
    yield (
        parent is not None and parent.data.tags.get("setup") == "03.2",
        f"{named(run)} repeats {named(original)}, which is no run of the family that the setup cell made.",
    )
    family = [each for each in evidence.children(parent) if each.info.status == "FINISHED" and _accuracy(each) >= 0]
    ranked = sorted(map(_accuracy, family), reverse=True)
    yield (
        len(ranked) > 1 and _accuracy(original) == ranked[1],
        f"{named(run)} repeats {named(original)}, number {_rank(original, ranked)} of {len(ranked)} by `val_accuracy` "
        f"({_accuracy(original):.3f}): the second best has {ranked[1] if len(ranked) > 1 else 0:.3f}.",
    )
    then, now = original.data.params, run.data.params
    other = [name for name in sorted(then) if name != "device" and now.get(name) != then[name]]
    yield (
        not other,
        f"{named(run)} has {listed(f'`{name} = {now.get(name)}`' for name in other[:3])}, and {named(original)} "
        f"{listed(f'`{then[name]}`' for name in other[:3])}: `config_of(run)` takes every parameter as it was logged.",
    )
    different = _first_difference(original, run, evidence)
    yield not different, f"{named(run)} has the parameters of {named(original)}, but {different}."
    return (
        f"{named(run)} has the same losses as {named(original)}, all to the last bit. Compare the two in the UI: there "
        "is one curve, as each covers the other."
    )


def _rank(run: Run, ranked: list[float]) -> object:
    return ranked.index(_accuracy(run)) + 1 if _accuracy(run) in ranked else "?"


def _first_difference(original: Run, run: Run, evidence: Evidence) -> str:
    """Say where the histories differ first, an empty text if nowhere."""
    for metric in LOSSES:
        then, now = (
            [(point.step, point.value) for point in evidence.history(each, metric)] for each in (original, run)
        )
        if then == now:
            continue
        if [step for step, _ in then] != [step for step, _ in now]:
            return f"`{metric}` at steps {listed(step for step, _ in now)}, not {listed(step for step, _ in then)}"
        (step, before), (_, after) = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
        tags = [tag for tag in CAUSES if original.data.tags.get(tag) != run.data.tags.get(tag)]
        why = f" (other {listed(f'`{tag}`' for tag in tags)})" if tags else ""
        return f"`{metric}` at step {step} is {after:.9g} and was {before:.9g}{why}"
    return ""


@question("03")
def _own_count(evidence: Evidence) -> Question:
    """Ask how many trials of the learner's latest study pass a filter."""
    families = defaultdict(list)
    runs = evidence.runs_of("03_query_and_plot_runs") + evidence.runs
    for run in runs:
        if PARENT in run.data.tags and _accuracy(run) >= 0:
            families[run.data.tags[PARENT]].append(_accuracy(run))
    for parent in runs:
        values = sorted(families[parent.info.run_id])
        least = round(values[-3] - 0.01, 2) if len(values) > 5 else 1.0
        above, total = sum(value > least for value in values), len(values)
        if 1 < above < total - 1 and 2 * above != total:
            where = f"`metrics.val_accuracy > {least:.2f}`"
            return Question(
                f"How many trials of your run `{parent.info.run_name}` ({parent.info.run_id[:6]}) pass the filter "
                f"{where}?",
                str(above),
                "The search counts them: `len(children(run_id, where))`.",
                {
                    str(total): "These are all trials that have the metric. The filter leaves some out.",
                    str(total - above): "These are the others, which the filter leaves out.",
                    "none": "The filter compares numbers, and the best trial has more than this.",
                },
            )
    return Question(
        "A filter is `metrics.val_loss < 0.5`. A run logged 0.62, then 0.48, then 0.55. Is it found?",
        "no, because 0.55 is the latest value",
        "A search compares the value at the highest step.",
        {
            "yes, because 0.48 was logged": "A search does not look through the history.",
            "yes, because the mean is below": "A search calculates nothing.",
            "no, because a loss is no metric": "Every number that came out is a metric.",
        },
    )


@question("03")
def _text(evidence: Evidence) -> Question:
    return Question(
        "You need all runs with at most 8 channels. `params.channels <= '8'` is refused. What do you do?",
        "search without it, then make numbers in pandas",
        'The filter compares parameters as text only. `table["params.channels"].astype(int)` is a number.',
        {
            "write `params.channels <= 8` without quotes": "MLflow refuses this, too: a parameter is text.",
            "compare the texts in pandas, `<= '8'`": "As text, '16' comes before '8', so wide networks would pass.",
            "write `params.channels LIKE '8'`": "It finds 8 only, not 4.",
        },
    )


@question("03")
def _pages(evidence: Evidence) -> Question:
    return Question(
        "An experiment has 1,500 runs. `len(MlflowClient().search_runs([number]))` gives 1,000. Why?",
        "it is the first page, and its `token` leads on",
        "Nothing else says that there are more. `mlflow.search_runs` follows the pages by itself.",
        {
            "the other 500 runs were deleted by somebody": "They would not be counted at all: 1,500 are there.",
            "the other 500 runs have not finished yet": "Without a filter a search finds runs of every status.",
            "the store keeps only the latest 1,000 runs": "A store keeps all runs until somebody removes them.",
        },
    )
