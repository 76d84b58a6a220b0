"""Find what is wrong: an experiment with planted faults, and the judge of who hunts them."""

import difflib
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from demo_lib.config import DemoError, tracking_uri, without_login
from demo_lib.exercises.evidence import PARENT, Evidence
from demo_lib.exercises.faults import CLUES, KINDS, Planned, plan, why_sound
from demo_lib.exercises.judging import Expectations, counted, exercise, listed, named
from demo_lib.exercises.quiz import Question, question
from demo_lib.store import Link, connect, own_model_name, own_name, ui_link

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

EXPERIMENT = "hunt"
FEWEST, MANY = 6, 10  # kinds of faults: from so many on a hunt can be made, and counts for 09.1 and no longer for 03.3
HISTORIES = {"steps_start_over", "chosen_on_test", "nan_loss", "cut_short"}  # kinds that only a history shows
PROCESS = "lab-7:3f1c9a52:7be0d1c4:4026531836:{}:{}"  # as `identity` says it, on a machine that is none


@dataclass(frozen=True)
class Hunt:
    """A hunt that lies in the store, shown with the link to its experiment."""

    seed: int
    faults: int
    runs: int
    model: str
    made: bool
    link: Link

    @property
    def text(self) -> str:
        """What was made."""
        is_there = "is made" if self.made else "was there already"
        return (
            f"The hunt with seed {self.seed} {is_there}: {self.runs} runs of the experiment {own_name(EXPERIMENT)} "
            f"and the model {self.model}, with faults of {self.faults} kinds."
        )

    def __str__(self) -> str:
        return f"{self.text}\n{self.link}"

    def _repr_html_(self) -> str:
        return f"{self.text}<br>{self.link._repr_html_()}"


def hunt(seed: int, faults: int = FEWEST) -> Hunt:
    """Fill the experiment `hunt` with a week of runs, some with faults; the seed draws both. Connects as `connect`.

    A hunt that is there stays as it is, and what an interrupted call left out is added. A seed that is no whole number
    from 0 on, faults that are not 6 to 12, and a seed that is there with another number of faults are a DemoError.
    """
    seed = _whole("seed", seed, 0, 999_999_999)
    faults = _whole("faults", faults, FEWEST, len(KINDS))
    place, planned = connect(EXPERIMENT), plan(seed, faults)
    found = mlflow.search_runs([place.experiment_id], f"tags.hunt = '{seed}'", output_format="list")
    if other := {run.data.tags.get("hunt_faults") for run in found} - {str(faults)}:
        todo = f"choose another seed, or faults={listed(sorted(map(str, other)))}"
        raise DemoError(f"a hunt with seed {seed} and other faults is there: {todo}.")
    runs = {run.info.run_name: run for run in found}
    made = any(each.name not in runs or _unended(runs[each.name], each) for each in planned)
    if made:
        now = int(1000 * time.time())
        tags = {"hunt": str(seed), "hunt_faults": str(faults), "hunt_made": str(now)}
        for each in planned:
            known = runs.get(each.name)
            if known is None or known.info.status == "RUNNING":
                runs[each.name] = _record(place.experiment_id, each, known, tags, now, runs)
    model = own_model_name(f"hunt-{seed}")
    made |= _register(model, [(each, runs[each.name]) for each in planned if each.version])
    return Hunt(seed, faults, len(planned), model, made, ui_link(place))


def _whole(name: str, value: object, least: int, most: int) -> int:
    text = str(value).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise DemoError(f"{name} = {text[:20]!r} is not allowed: give a whole number from {least} to {most}.")
    return int(text)


def _unended(run: Run, planned: Planned) -> bool:
    return run.info.status == "RUNNING" != planned.status


def _record(place: str, planned: Planned, known: Run | None, tags: dict, now: int, runs: dict[str, Run]) -> Run:
    """Write the run, or write it again: the same values at the same times are stored once."""
    client = MlflowClient()
    tags = tags | planned.tags | {"process": PROCESS.format(planned.start, 60_000_000 - planned.start)}
    if planned.parent:
        tags[PARENT] = runs[planned.parent].info.run_id
    start = now - 60_000 * planned.start
    run = known or client.create_run(place, start, tags, planned.name)
    run_id, start, length = run.info.run_id, run.info.start_time, 60_000 * planned.minutes
    metrics = [Metric(name, value, start + int(when * length), step) for name, step, value, when in planned.points]
    params = [Param(name, str(value)) for name, value in planned.params.items()]
    client.log_batch(run_id, metrics, params, [RunTag(*each) for each in tags.items()] if known else ())
    if planned.status != "RUNNING":
        client.set_terminated(run_id, planned.status, start + int(length))
    return run


def _register(name: str, versions: list[tuple[Planned, Run]]) -> bool:
    """Register the runs' models, which have no files, and set the alias; return whether something was missing."""
    client = MlflowClient()
    there = client.search_registered_models(f"name = '{name}'")
    if there and "champion" in there[0].aliases:
        return False
    if not there:
        client.create_registered_model(name)
    known = {each.run_id: each.version for each in client.search_model_versions(f"name = '{name}'")}
    for run in [run for _, run in sorted(versions, key=lambda each: each[0].version)]:
        run_id = run.info.run_id
        if run_id not in known:
            model = client.create_logged_model(run.info.experiment_id, "best_model", run_id)
            client.finalize_logged_model(model.model_id, "READY")
            source = f"models:/{model.model_id}"
            made = client.create_model_version(name, source, run_id, model_id=model.model_id)
            known[run_id] = made.version
    champion = next(run.info.run_id for planned, run in versions if planned.champion)
    client.set_registered_model_alias(name, "champion", known[champion])
    return True


def _hunts(evidence: Evidence) -> dict[tuple[int, int], list[Run]]:
    """Return the runs of each hunt by its seed and number of faults, tagged ones first and the newest last."""
    found = defaultdict(list)
    for run in evidence.runs_of(EXPERIMENT):
        with suppress(DemoError):
            seed = _whole("seed", run.data.tags.get("hunt"), 0, 999_999_999)
            faults = _whole("faults", run.data.tags.get("hunt_faults"), FEWEST, len(KINDS))
            found[seed, faults].append(run)
    return {key: sorted(runs, key=lambda run: (not _fault(run), run.info.start_time)) for key, runs in found.items()}


def _fault(run: Run) -> str:
    return run.data.tags.get("fault", "").strip()


def _counts_for(number: str, faults: int) -> bool:
    return (faults >= MANY) == (number == "09.1")


def _attempts(evidence: Evidence, number: str) -> list[list[Run]]:
    """Return the runs of each hunt that counts for the exercise and has a tag `fault`."""
    found = _hunts(evidence).items()
    return [runs for (_, faults), runs in found if _counts_for(number, faults) and any(map(_fault, runs))]


def _say_what_is_missing(number: str, evidence: Evidence) -> str:
    there = _hunts(evidence)
    if own := [seed for seed, faults in there if _counts_for(number, faults)]:
        near = [run for runs in there.values() for run in runs if {"Fault", "faults", "exercise"} & {*run.data.tags}]
        other = f" But {named(near[0])} has a tag of another name." if near else ""
        return f"no run of your hunt with seed {own[0]} has the tag `fault`: tag each guilty one `fault = KIND`.{other}"
    size, call = ("10 or more", "hunt(9, faults=10)") if number == "09.1" else ("fewer than 10", "hunt(3)")
    place = f"the experiment `{own_name(EXPERIMENT)}` of {without_login(tracking_uri())}"
    return f"{place} has no hunt of {size} kinds of faults, which count here: `{call}` makes one."


@exercise("03.3", "find what is wrong", attempts=_attempts, missing=partial(_say_what_is_missing, "03.3"))
@exercise("09.1", "find all that is wrong", attempts=_attempts, missing=partial(_say_what_is_missing, "09.1"))
def judge(runs: list[Run], evidence: Evidence) -> Expectations:
    """Judge what was found of one hunt: the first expectations are its kinds, so more found ones are closer."""
    seed, faults = (int(runs[0].data.tags[tag]) for tag in ("hunt", "hunt_faults"))
    planned = {each.name: each for each in plan(seed, faults)}
    there = {run.info.run_name for run in runs}
    missing = [name for name in planned if name not in there]
    yield (
        not missing,
        f"the hunt with seed {seed} lacks {counted(len(missing), 'run')}, as `{[*missing, ''][0]}`: restore what is "
        f"deleted or renamed, or let `hunt({seed}, {faults})` make it again.",
    )
    tagged = {run.info.run_name: _fault(run) for run in reversed(runs)}  # of two with one name, the tagged one
    guilty, hits = defaultdict(list), defaultdict(int)
    for each in planned.values():
        if each.fault:
            guilty[each.fault].append(each)
            hits[each.fault] += tagged[each.name] == each.fault
    found = [kind for kind in guilty if hits[kind] == len(guilty[kind])]
    for _ in found:
        yield True, "a kind is found"
    text = (
        f"{len(found)} of {len(guilty)} faults are found, with {sum(hits.values())} of "
        f"{sum(map(len, guilty.values()))} guilty runs."
    )
    wrong = _mistakes([run for run in runs if _fault(run)], planned)
    hidden = [kind for kind in KINDS if kind in guilty and kind not in found]
    yield not (wrong or hidden), " ".join([text, *wrong, *_clue(hidden, hits, guilty)])
    return f"{text} Nothing sound is accused. Another seed draws other faults" + (
        ": the same queries should find them, too." if faults >= MANY else f"; `faults={MANY}` is harder."
    )


def _mistakes(tagged: list[Run], planned: dict[str, Planned]) -> list[str]:
    """Return a sentence for the first tag of each sort that is wrong, and for how many more there are."""
    unknown, other, false = [], [], []
    for run in tagged:
        kind, about = _fault(run), planned.get(run.info.run_name)
        if kind not in KINDS:
            near = difflib.get_close_matches(kind.lower(), KINDS, 1, 0.5)
            meant = f": do you mean `{near[0]}`?" if near else ", see `KINDS`."
            unknown.append(f"{named(run)} has `fault = {kind[:30]}`, which is no kind{meant}")
        elif about is None:
            false.append(f"No fault: {named(run)} is not one of the hunt's runs.")
        elif about.fault is None:
            why = why_sound(about, kind, [*planned.values()])
            false.append(f"No fault: {named(run)} is tagged `{kind}`, but {why}.")
        elif about.fault != kind:
            other.append(f"Wrong kind: {named(run)} is guilty, but not of `{kind}`.")
    said = []
    for sentences in (unknown, false, other):
        if sentences:
            first = sentences[0][0].upper() + sentences[0][1:]
            said.append(first + (f" {len(sentences) - 1} more like this." if sentences[1:] else ""))
    return said


def _clue(hidden: list[str], hits: dict[str, int], guilty: dict[str, list[Planned]]) -> list[str]:
    """Return one line about a kind of which something is still hidden, first about one that is found in part."""
    for kind in sorted(hidden, key=HISTORIES.__contains__):  # what the table shows comes first
        if hits[kind]:
            return [f"Still hidden: of `{kind}` you have {hits[kind]} of {len(guilty[kind])} runs."]
    easy = min(hidden, key=HISTORIES.__contains__, default=None)
    return [f"Still hidden: something about {CLUES[easy]}."] if easy else []


@question("03.3")
def _longest(evidence: Evidence) -> Question:
    """Ask which of four runs took longest."""
    for (seed, _), runs in _hunts(evidence).items():
        done = [run for run in runs if run.info.status == "FINISHED" and "study" not in run.data.tags]
        took = {run.info.run_name: (run.info.end_time - run.info.start_time) / 60_000 for run in done[-4:]}
        if len({round(minutes, 1) for minutes in took.values()}) < 4:
            continue
        longest = max(took, key=took.__getitem__)
        return Question(
            f"Which of these runs of your hunt with seed {seed} took longest?",
            f"`{longest}`",
            f"It took {took.pop(longest):.1f} minutes. The table has `start_time` and `end_time`: subtract them.",
            {f"`{name}`": f"It took {minutes:.1f} minutes. Another took longer." for name, minutes in took.items()},
        )
    return Question(
        "A table from `mlflow.search_runs` has no column with the length of a run. How do you get it?",
        "`table.end_time - table.start_time`",
        "Both are times in pandas, and their difference is a time span.",
        {
            '`table["metrics.duration"]`': "Only what a run has logged is a metric. MLflow logs no duration.",
            '`table["attributes.duration"]`': "In the table the attributes have no such prefix, and this is none.",
            "`table.end_time.diff()`": "This subtracts the end of the row before, so of another run.",
        },
    )


@question("03.3")
def _missing_or_nan(evidence: Evidence) -> Question:
    return Question(
        "In the table of `mlflow.search_runs` a run has NaN in the column `metrics.val_loss`. What do you know?",
        "the last value is NaN, or there is none",
        "pandas writes both the same. The history of the metric tells them apart.",
        {
            "the loss of this run became NaN": "Perhaps. But what does the table show for a run that logged no loss?",
            "this run has logged no `val_loss`": "Perhaps. But a network can also learn so fast that its loss is lost.",
            "this run is FAILED, or still RUNNING": "A status has its own column, and no metric changes it.",
        },
    )


@question("03.3")
def _numbers(evidence: Evidence) -> Question:
    return Question(
        'In pandas, `table["params.epochs"] > "10"` is true for a run with 8 epochs. Why?',
        'parameters are text, and "8" sorts after "1"',
        "Texts are compared character by character. `.astype(float)` makes numbers of them.",
        {
            "8 is the run's last step, and not its epochs": "Parameters have no steps. They have one value, as text.",
            "the table was not sorted by the parameter": "A comparison looks at one row at a time, in any order.",
            "the run has ended before its tenth epoch": "What was logged later does not change a parameter.",
        },
    )


@question("09.1")
def _best_study(evidence: Evidence) -> Question:
    """Ask which study had the best trial."""
    for (seed, _), runs in _hunts(evidence).items():
        best = {run.info.run_name: run.data.metrics.get("best_val_accuracy") for run in runs}
        best = {name: accuracy for name, accuracy in best.items() if accuracy is not None}
        if len({*best.values()}) == len(best) == 3:
            winner = max(best, key=best.__getitem__)
            return Question(
                f"Which study of your hunt with seed {seed} found the highest validation accuracy?",
                f"`{winner}`",
                f"Its best trial has {best.pop(winner):.4f}. But was it the same data? Look at the digests.",
                {f"`{name}`": f"Its best has {value:.4f}, another more." for name, value in best.items()},
            )
    return Question(
        "Two studies have the best `val_accuracy` 0.88 and 0.87, and other values of `data_digest`. Which is better?",
        "they can't be compared",
        "Each was measured on other images, so the difference may come from them.",
        {
            "the one with 0.88": "It would be, on the same images. What does the digest say?",
            "the one with more trials": "More trials find more by luck. It says nothing of the images.",
        },
    )


@question("09.1")
def _who_ends_it(evidence: Evidence) -> Question:
    return Question(
        "The machine of a training loses its power. What ends its run in the store?",
        "somebody who later sees that the process is gone",
        "The process can do nothing any more. `connect` of demo_lib ends such runs, if they are of this machine.",
        {
            "the `with` block, as for every exception": "It stands in the process, and the process is gone.",
            "the server, after an hour without metrics": "MLflow's server waits for ever: a training may be slow.",
            "`truthful_status`, which knows all signals": "It knows signals. But no signal came before the power went.",
        },
    )


@question("09.1")
def _same_but_not_same(evidence: Evidence) -> Question:
    return Question(
        "Two runs have the same parameters and the same seed, but other histories. Where do you look first?",
        "at the tags of the code version and of the data",
        "Equal settings on equal data and code give equal values, at least on the same machine.",
        {
            "at the learning rate in their parameters": "The parameters are the same, so the rate is.",
            "at the names that the two runs were given": "A name is for people. No training reads it.",
            "at the status with which the two runs ended": "It says how they ended. The values were logged before.",
        },
    )
