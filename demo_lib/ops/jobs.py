"""The jobs of a batch: lessons, or one lesson with many sets of parameters, all checked before anything starts.

A batch's plan is its jobs as plain data. It is kept with the batch's run, so that the batch can go on after any end.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_lib.config import LESSONS, ROOT, DemoError, lessons, load_yaml, settings

import papermill as pm
from pydantic import TypeAdapter, ValidationError

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
MANY = 10_000  # sets of a sweep
LONG = 100  # characters of a folder's name: with the path before it, Windows takes 260


@dataclass
class Job:
    """One execution of a notebook, and what came of it: plain data, which another process can take and give back."""

    name: str  # of its run
    notebook: Path
    digest: str  # of the notebook when the batch was planned
    params: dict[str, Any]
    output: Path
    apart: dict[str, Any]  # what tells it from the others of its batch
    number: int = 0
    run_id: str = ""
    status: str = "NOT RUN"  # then RUNNING and, as MLflow calls them, FINISHED, FAILED or KILLED
    seconds: float = 0.0
    error: str = ""
    ended: float = 0.0  # when its run did, in seconds since 1970; 0: unknown


def plan(names: Iterable[str], params: Mapping[str, Any], output: Path) -> list[Job]:
    """Return one job a lesson, all lessons if none is named, each with those of the parameters that it declares.

    A name is a lesson's number, file stem or path. Values may be text, as a command line gives them. An unknown lesson,
    a parameter that no chosen lesson declares, a value that is not allowed, and executed notebooks that would replace
    each other, or a notebook that is to be executed, are a DemoError.
    """
    notebooks = list(dict.fromkeys(map(_find, names))) or lessons()
    small = [each.name.lower() for each in notebooks]  # macOS and Windows take a.ipynb and A.ipynb for one
    if twice := [name for name in small if small.count(name) > 1]:
        raise DemoError(f"two of the notebooks are called {twice[0]}: run them apart, each with another --output.")
    outputs = [output.resolve() / notebook.name for notebook in notebooks]
    _refuse_overwriting(notebooks, outputs)
    declared = {notebook: _declared(notebook) for notebook in notebooks}
    values = _checked(params, {name: kind for each in declared.values() for name, kind in each.items()})
    made = []
    for path, (notebook, kinds) in zip(outputs, declared.items(), strict=True):
        own = {name: values[name] for name in kinds if name in values}
        apart = {"lesson": notebook.stem}
        made.append(Job(notebook.stem, notebook, digest(notebook), own, path, apart, len(made)))
    return made


def sweep(names: Sequence[str], sets: Sequence[Mapping[str, Any]], common: Mapping, output: Path) -> list[Job]:
    """Return one job for each set of parameters, which wins over those that are common; all run the same lesson.

    A job is named by what differs among the sets, and so is the folder of its executed notebook. Several lessons, sets
    that are equal, and what `plan` refuses are a DemoError that names the set.
    """
    found = list(dict.fromkeys(map(_find, names)))
    if len(found) != 1:
        raise DemoError("--sweep runs one lesson many times: name one.")
    kinds, made = _declared(found[0]), {}
    _checked(common, kinds)
    for number, given in enumerate(sets, 1):
        try:
            values = _checked({**common, **given}, kinds)
        except DemoError as error:
            raise DemoError(f"set {number} of the sweep: {error}") from None
        key = json.dumps(values, sort_keys=True)
        if key in made:
            raise DemoError(f"sets {[*made].index(key) + 1} and {number} of the sweep are equal: leave one out.")
        made[key] = values
    apart = _differences([*made.values()])
    sha, jobs = digest(found[0]), []
    for name, values, own in zip(_names(found[0].stem, apart), made.values(), apart, strict=True):
        path = output.resolve() / name / found[0].name
        jobs.append(Job(name, found[0], sha, values, path, own if len(made) > 1 else {"lesson": name}, len(jobs)))
    _refuse_overwriting(found, [job.output for job in jobs])
    return jobs


def read_sets(path: Path) -> list[dict[str, Any]]:
    """Read the sets of parameters of a sweep: a list of mappings, or a mapping of lists for all their combinations.

    A file that can't be read, holds neither, or no set, is a DemoError.
    """
    given = load_yaml(path)
    if isinstance(given, dict):
        if wrong := [name for name, values in given.items() if not isinstance(values, list) or not values]:
            raise DemoError(f"{path} must give a list of values for {wrong[0]}, as `{wrong[0]}: [1, 2]`.")
        count, given = math.prod(map(len, given.values())), _combinations(given)
    elif isinstance(given, list):
        if wrong := [number for number, each in enumerate(given, 1) if not isinstance(each, dict)]:
            raise DemoError(f"set {wrong[0]} of {path} must be a mapping, as `- epochs: 2`.")
        count = len(given)
    else:
        count = 0
    if not 0 < count <= MANY:
        what = "must hold a list of sets, or a list of values for each parameter: from 1"
        raise DemoError(f"{path} {what} to {MANY:,} sets.")
    return list(given)


def dump(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the plan of the jobs for a JSON file; what lies in the repository, or the home, may move with it."""
    home, kept = settings().home, ("name", "digest", "params", "apart")
    plan = [{name: getattr(job, name) for name in kept} for job in jobs]
    for each, job in zip(plan, jobs, strict=True):
        each |= {"notebook": _relative(job.notebook, ROOT), "output": _relative(job.output, home.resolve())}
    return {"jobs": plan}


def load(plan: Mapping[str, Any]) -> list[Job]:
    """Return the jobs of a plan that `dump` made."""
    home = settings().home.resolve()
    return [
        Job(**each | {"notebook": ROOT / each["notebook"], "output": home / each["output"], "number": number})
        for number, each in enumerate(plan["jobs"])
    ]


def refuse_changed(jobs: Iterable[Job]) -> None:
    """Raise a DemoError if a job's notebook is not what it was when the batch began."""
    for job in jobs:
        if not job.notebook.is_file():
            raise DemoError(f"{job.notebook} is gone: bring it back, or begin a new batch.")
        if digest(job.notebook) != job.digest:
            raise DemoError(f"{job.notebook} has changed since the batch began: undo that, or begin a new batch.")


def make_folders(jobs: Iterable[Job]) -> None:
    """Make the folders of the executed notebooks; one that can't be made is a DemoError."""
    for folder in {job.output.parent for job in jobs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"the folder {folder} can't be made ({error.strerror}): choose another --output.") from None


def digest(notebook: Path) -> str:
    """Return the SHA-256 of the notebook's file."""
    return hashlib.sha256(notebook.read_bytes()).hexdigest()


def _find(name: str) -> Path:
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name).resolve()
    for notebook in lessons():
        if name in (notebook.stem, notebook.name, notebook.stem.split("_")[0]):
            return notebook
    raise DemoError(f"there is no lesson {name!r}; there are: {', '.join(path.stem for path in lessons())}.")


def _declared(notebook: Path) -> dict[str, str]:
    """Return the types of the notebook's parameters by name."""
    try:
        return {name: each["inferred_type_name"] for name, each in pm.inspect_notebook(notebook).items()}
    except Exception as error:  # of JSON, of nbformat, of papermill
        raise DemoError(
            f"{notebook} is no notebook ({type(error).__name__}: {str(error)[:200]}): correct it."
        ) from None


def _checked(params: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters with the types that the notebooks declare."""
    values = {}
    for name, value in params.items():
        if name not in kinds:
            raise DemoError(f"no chosen lesson has a parameter {name!r}; they have: {', '.join(kinds) or 'none'}.")
        try:
            values[name] = TypeAdapter(TYPES.get(kinds[name], Any)).validate_python(value)
            if json.loads(json.dumps(values[name], allow_nan=False)) != values[name]:  # as it will be in the notebook
                raise ValueError
        except (ValidationError, TypeError, ValueError):
            what = {"float": "float, not nan or inf", "None": "text, number, list or mapping"}
            kind = kinds[name]
            raise DemoError(f"parameter {name} = {value!r} must be of type {what.get(kind, kind)}.") from None
    return values


def _differences(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each set the parameters that are not the same in all."""
    names = dict.fromkeys(name for each in sets for name in each)
    texts = {name: {json.dumps(each[name]) if name in each else "" for each in sets} for name in names}
    return [{name: each[name] for name in names if name in each and len(texts[name]) > 1} for each in sets]


def _names(stem: str, apart: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each set that is a folder's name on every system, and no other's."""
    whole = [" ".join([stem, *(f"{name}={value}" for name, value in each.items())]) for each in apart]
    safe = [re.sub(r"[^\w =.,+-]", "_", each, flags=re.ASCII)[:LONG].strip(" .") for each in whole]
    small = [each.lower() for each in safe]
    # No value can have brackets, as they are replaced.
    return [f"{each} ({i})" if small.count(each.lower()) > 1 else each for i, each in enumerate(safe, 1)]


def _combinations(values: Mapping[str, list]) -> Iterable[dict[str, Any]]:
    return (dict(zip(values, each, strict=True)) for each in itertools.product(*values.values()))


def _refuse_overwriting(notebooks: Iterable[Path], outputs: Iterable[Path]) -> None:
    if lost := {*outputs} & {*notebooks, *LESSONS.glob("*.ipynb")}:
        raise DemoError(f"{min(lost)} would be overwritten: choose another --output.")


def _relative(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
