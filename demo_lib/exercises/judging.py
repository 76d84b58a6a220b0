"""How an attempt is judged: exercises, what they expect, the four answers and how they are shown."""

import difflib
import html
import os
import re
import textwrap
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from demo_lib.config import DemoError, restored_variables, sqlite_file, tracking_uri, without_login
from demo_lib.exercises.evidence import EXPERIMENT, Evidence, metrics_of, of_this_login
from demo_lib.store import Link, open_store, own_name, ui_link

import mlflow
from mlflow import MlflowException
from mlflow.entities import LoggedModel, Run, ViewType
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

MOST = 50  # attempts that are judged, the latest
RECENT = 15 * 60_000  # milliseconds for which a run without the tag may be a forgotten attempt
NOT_THERE = (MlflowException, RequestException, SQLAlchemyError, OSError)  # what a store raises that can't be read

Answer = Literal["not attempted", "not yet", "passed", "can't tell"]
# A pair is one expectation: whether it is met, and what is said if not. What is returned is said if all are met.
Expectations = Generator[tuple[bool, str], None, str]


@dataclass(frozen=True)
class Exercise:
    """One task: how its attempts are found, and what is expected of one, or of all good ones together."""

    number: str
    title: str
    judge: Callable[[Any, Evidence], Expectations]
    attempts: Callable[[Evidence, str], list]
    together: Callable[[list, Evidence], Expectations] | None
    rubric: bool  # show every expectation and not only the first that is missed
    missing: Callable[[Evidence], str] | None = None  # what is said without an attempt, if none has the tag


EXERCISES: dict[str, Exercise] = {}


def exercise(
    number: str,
    title: str,
    attempts: Callable[[Evidence, str], list] = Evidence.tagged,
    together: Callable[[list, Evidence], Expectations] | None = None,
    rubric: bool = False,
    missing: Callable[[Evidence], str] | None = None,
) -> Callable:
    """Make the function the judge of an attempt at the exercise: runs with its tag, or what `attempts` finds.

    Where attempts have another mark than the tag, `missing` says what is to be done if there is none. Expectations
    stand in an order in which each may count on those before it.
    """

    def add(judge: Callable[[Any, Evidence], Expectations]) -> Callable:
        EXERCISES[number] = Exercise(number, title, judge, attempts, together, rubric, missing)
        return judge

    return add


@dataclass(frozen=True)
class Reply:
    """The answer to one exercise, shown as a box in a notebook and as text in a terminal."""

    number: str
    title: str
    answer: Answer
    text: str
    points: list[tuple[bool, str]] = field(default_factory=list)
    link: Link | None = None
    first: int | None = None  # when the first attempt began, in milliseconds since 1970

    def __str__(self) -> str:
        mark = {"passed": "[x]", "not yet": "[~]", "not attempted": "[ ]", "can't tell": "[?]"}[self.answer]
        lines = [f"{mark} {self.number} {self.answer}: {self.text}"]
        lines += [f"{'[x]' if met else '[ ]'} {text}" for met, text in self.points]
        wrapped = [_wrapped(line) for line in lines]
        return "\n".join([*wrapped, *([f"    {self.link}"] if self.link else [])])

    def _repr_html_(self) -> str:
        kind, mark = {
            "passed": ("success", "&#10004;"),
            "not yet": ("warning", "&#9998;"),
            "not attempted": ("info", "&#9675;"),
            "can't tell": ("danger", "?"),
        }[self.answer]
        points = "".join(
            f"<li>{'&#10004;' if met else '&#9675; <strong>missing:</strong>'} {_code(text)}</li>"
            for met, text in self.points
        )
        return (
            f'<div class="alert alert-{kind}" style="color: #1a1a1a">'  # JupyterLab's orange on orange is hard to read
            f"<strong>{mark} {self.number} {self.answer}.</strong> {_code(self.text)}"
            + (f"<ul>{points}</ul>" if points else "")
            + (f"<br>{self.link._repr_html_()}" if self.link else "")
            + "</div>"
        )


def _wrapped(text: str) -> str:
    """Return the text in lines of a terminal's width; code, between backticks, stays on one line."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)  # a name can hold a terminal's commands
    whole = re.sub("`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)
    options = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(whole, 96, **options).replace("\0", " ")


def _code(text: str) -> str:
    """Return the text as HTML, what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def find_exercise(number: str) -> Exercise:
    """Return the exercise; an unknown number is a DemoError."""
    if number not in EXERCISES:
        near = difflib.get_close_matches(str(number), EXERCISES, 1)
        meant = f": do you mean {near[0]!r}? There" if near else "; there"
        raise DemoError(f"there is no exercise {number!r}{meant} are {', '.join(EXERCISES)}.")
    return EXERCISES[number]


def check(number: str) -> Reply:
    """Judge what lies in the store as attempts at the exercise, as "02.1"; it only reads.

    The answer is *not attempted*, *not yet* (about the closest attempt), *passed*, or *can't tell* if the store does
    not answer. A number that no exercise has is a DemoError.
    """
    return check_all([number])[0]


def check_all(numbers: Iterable[str], evidence: Evidence | None = None) -> list[Reply]:
    """Judge several exercises by one reading of the store; errors are those of `check`.

    The evidence is that of whoever asks, or given; of somebody else's misplaced attempts nothing is said.
    """
    exercises = [find_exercise(number) for number in numbers]
    if evidence is not None:
        return list(_replies(exercises, evidence))
    try:
        with soon_given_up():
            return list(_replies(exercises, open_evidence()))
    except DemoError as error:
        return [_cant_tell(each, error) for each in exercises]


def _replies(exercises: list[Exercise], evidence: Evidence) -> Iterator[Reply]:
    """Yield the replies; what a person made can't keep other exercises from being judged, a store that is gone can."""
    gone: Exception | None = None
    for each in exercises:
        try:
            yield _cant_tell(each, gone) if gone else _reply(each, evidence, alone=len(exercises) == 1)
        except Exception as error:
            yield _cant_tell(each, error)
            try:
                evidence.client.search_experiments(max_results=1)
            except NOT_THERE as reason:
                gone = reason


@contextmanager
def soon_given_up() -> Iterator[None]:
    """Let requests to a server that has gone away fail after seconds; MLflow's own retries take minutes."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    with restored_variables(*limits):
        os.environ |= limits
        yield


def _cant_tell(exercise: Exercise, error: Exception) -> Reply:
    reason = (str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__)[:200]
    text = f"The store can't be read: {reason}. What you have done is not lost; check again when that is mended."
    return Reply(exercise.number, exercise.title, "can't tell", text)


def open_evidence() -> Evidence:
    """Open the store as `open_store` does, for whoever asks, but make none: a check only reads."""
    database = sqlite_file(tracking_uri())
    if database is not None and (not database.exists() or not database.stat().st_size):
        return Evidence(lambda experiment: None)
    open_store()
    return of_this_login()


@dataclass(frozen=True)
class _Verdict:
    """How far one attempt came: the expectations up to the first that is missed, and the last words."""

    attempt: Any
    passed: bool
    text: str
    points: list[tuple[bool, str]]

    @property
    def met(self) -> int:
        return sum(ok for ok, _ in self.points)


def _reply(exercise: Exercise, evidence: Evidence, alone: bool) -> Reply:
    attempts = exercise.attempts(evidence, exercise.number)[:MOST]
    about = {"number": exercise.number, "title": exercise.title}
    if not attempts:
        missing = exercise.missing or partial(_where_it_looked, exercise, alone)
        return Reply(**about, answer="not attempted", text=_sentence(missing(evidence)) if evidence.own else "")
    verdicts = [_judge(exercise.judge(each, evidence), each, exercise.rubric) for each in attempts]
    closest = max(verdicts, key=lambda verdict: (verdict.passed, verdict.met))  # of equals the first, so the latest
    good = [verdict.attempt for verdict in verdicts if verdict.passed]
    if exercise.together and good:
        all_good = _judge(exercise.together(good, evidence), closest.attempt, False)
        if not all_good.passed and len(good) < len(verdicts):
            missed = next(each for each in verdicts if not each.passed)
            all_good = _Verdict(missed.attempt, False, f"{all_good.text} Not counted: {missed.text}", [])
        closest = all_good
    text = _sentence(closest.text)
    if not closest.passed and not exercise.together and len(verdicts) > 1:
        latest = "" if closest is verdicts[0] or exercise.rubric else f" Your latest attempt: {verdicts[0].text}"
        text = f"Of {len(verdicts)} attempts this is the closest. {text}{latest}"
    points = closest.points if exercise.rubric and not closest.passed else []
    started = [_start(each) for each in attempts]
    answer: Answer = "passed" if closest.passed else "not yet"
    return Reply(**about, answer=answer, text=text, points=points, link=_link(closest.attempt), first=min(started))


def _judge(expectations: Expectations, attempt: Any, rubric: bool) -> _Verdict:
    points = []
    try:
        while True:
            ok, text = next(expectations)
            points.append((bool(ok), text))
            if not ok and not rubric:
                return _Verdict(attempt, False, text, points)
    except StopIteration as end:
        passed = all(ok for ok, _ in points)
        return _Verdict(attempt, passed, end.value, points)
    except NOT_THERE:
        raise
    except Exception as error:  # an attempt can hold anything: it is no reason to fail
        text = f"{named(attempt)} has something that can't be read ({type(error).__name__}: {error})."
        return _Verdict(attempt, False, text, [*points, (False, text)])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _first_run(attempt: Any) -> Any:
    return attempt[0] if isinstance(attempt, list) else attempt


def _start(attempt: Any) -> int:
    attempt = attempt[-1] if isinstance(attempt, list) else attempt
    if isinstance(attempt, ModelVersion):
        return attempt.creation_timestamp
    made = attempt.data.tags.get("hunt_made", "")  # a hunt's runs lie in the past
    return int(made) if re.fullmatch(r"[0-9]{13}", made) else attempt.info.start_time


def _is_fresh(attempt: Any) -> bool:
    return _start(attempt) > 1000 * time.time() - RECENT


def _link(attempt: Any) -> Link | None:
    attempt = _first_run(attempt)
    if isinstance(attempt, ModelVersion):
        return ui_link(RegisteredModel(attempt.name))
    return ui_link(attempt)


def named(attempt: Any) -> str:
    """Return how a reply names a run or a version: by its name and the id's first digits."""
    attempt = _first_run(attempt)
    if isinstance(attempt, ModelVersion):
        return f"version {attempt.version} of `{attempt.name}`"
    return f"run `{attempt.info.run_name}` ({attempt.info.run_id[:6]})"


def listed(values: Iterable[object]) -> str:
    """Return the values with commas and, before the last, with `and`; at most eight."""
    words = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    if len(words) > 8:
        words = [*words[:7], f"{len(words) - 7} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "none"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return the number with its noun, as in `1 child`, `3 children`."""
    return f"{number or 'no'} {noun if number == 1 else plural or f'{noun}s'}"


def finished(run: Run) -> tuple[bool, str]:
    """Expect that the run ended well."""
    why = {
        "RUNNING": "it was never ended. Log inside of `with mlflow.start_run(...)`, which ends the run",
        "FAILED": "an error left its `with` block",
        "KILLED": "it was interrupted",
    }.get(run.info.status, "it has not ended")
    return run.info.status == "FINISHED", f"{named(run)} is {run.info.status}: {why}."


def has_metric(run: Run, model: LoggedModel, metric: str) -> tuple[bool, str]:
    """Expect that the model has the metric, and not only its run."""
    where = "on the run alone" if metric in run.data.metrics else "nowhere"
    return metric in metrics_of(model), (
        f"the model `{model.name}` of {named(run)} has no `{metric}`; it is {where}. Log it with `model_id`, so that "
        "it is the model's."
    )


def _where_it_looked(exercise: Exercise, alone: bool, evidence: Evidence) -> str:
    """Say where attempts were looked for, and what looks like one that was misplaced."""
    number, name = exercise.number, own_name(EXPERIMENT)
    place = f"the experiment `{name}` of {without_login(tracking_uri())}"
    thing = f"run in {place}"
    if exercise.attempts is Evidence.versions:
        thing = f"registered version of a model that a run in {place} made"
    near = next(_near_misses(exercise, evidence, alone), "")
    return f"no {thing} has the tag `exercise = {number}`. {near}".rstrip()


def _near_misses(exercise: Exercise, evidence: Evidence, alone: bool) -> Iterator[str]:
    number, place = exercise.number, evidence.place(EXPERIMENT)
    if exercise.attempts is Evidence.versions and (runs := evidence.tagged(number)):
        yield f"But {named(runs[0])} has it: here the registered version needs the tag."
    if exercise.attempts is Evidence.versions and (version := evidence.untagged_version()) and _is_fresh(version):
        call = f'set_model_version_tag("{version.name}", "{version.version}", "exercise", "{number}")'
        todo = f"set it with `mlflow.MlflowClient().{call}`"
        yield f"But {named(version)} is new and has no tag `exercise`: if it is your attempt, {todo}."
    if place is None:
        there = sqlite_file(tracking_uri()) is None or sqlite_file(tracking_uri()).exists()
        if there and mlflow.MlflowClient().get_experiment_by_name(own_name(EXPERIMENT)):
            yield f'The experiment is deleted: `connect("{EXPERIMENT}")` says how to go on.'
        elif not there:
            return
    here = {each.experiment_id: each.name for each in mlflow.search_experiments()}
    for run in evidence.search([*here], f"tags.exercise = '{number}'"):
        if run.info.experiment_id != place:
            where = here[run.info.experiment_id]
            todo = f'call `connect("{EXPERIMENT}")` first and do it again: a run can\'t be moved'
            yield f"But {named(run)} has it, in the experiment `{where}`: {todo}."
    if place is None:
        return
    for run in evidence.search([place], f"tags.exercise = '{number}'", ViewType.DELETED_ONLY):
        yield f"But {named(run)}, which has it, is deleted: restore it in the MLflow UI, or do it again."
    for run in evidence.runs:
        for tag, value in run.data.tags.items():
            digits = re.findall(r"\d{1,3}", value[:20])
            if tag.lower().rstrip("s") == "exercise" and [int(each) for each in digits] == [
                *map(int, number.split("."))
            ]:
                yield f"But {named(run)} has the tag `{tag} = {value}`: write it as `exercise = {number}`."
    # Only one exercise was asked for: of several, a new run can be an attempt at one at most.
    for run in evidence.runs if alone and exercise.attempts is not Evidence.versions else []:
        if _is_fresh(run) and not {"exercise", "setup", "mlflow.parentRunId"} & run.data.tags.keys():
            todo = f'set it with `mlflow.MlflowClient().set_tag("{run.info.run_id}", "exercise", "{number}")`'
            yield f"But {named(run)} began lately and has no tag `exercise`: if it is your attempt, {todo}."
