"""What the exercises of lesson 07 expect: a run from a git address, and the same run again."""

from pathlib import PurePath

from demo_lib.exercises.evidence import Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PROJECT_ENTRY_POINT, MLFLOW_SOURCE_NAME

EPOCHS = 2
COMPARED = "train_loss", "val_loss", "val_accuracy"


def _number(text: str | None) -> float | str | None:
    """Return the number that the text says, else the text in lower case."""
    try:
        return float(text or "")
    except ValueError:
        return text and text.lower()


def _is_project(run: Run) -> bool:
    return run.data.tags.get("mlflow.source.type") == "PROJECT"


@exercise("07.1", "from git, at a commit")
def from_git_at_a_commit(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run of the project."""
    tags, params = run.data.tags, run.data.params
    yield (
        _is_project(run),
        f"{named(run)} was not made by `mlflow run` or `mlflow.projects.run`: its source is "
        f"{tags.get('mlflow.source.type', 'unknown')}.",
    )
    entry = tags.get(MLFLOW_PROJECT_ENTRY_POINT, "")
    yield entry == "main", f"{named(run)} ran the entry point `{entry}`: `main` is asked for."
    source = tags.get(MLFLOW_SOURCE_NAME, "")
    yield (
        "://" in source,
        f"{named(run)} ran the files in the folder `{PurePath(source).name}`, whatever was changed there: give "
        "`mlflow.projects.run` the git address.",
    )
    unknown = [name for name in params if name.startswith("epoch") and name != "epochs"]
    more = f" It has the parameter `{unknown[0]}`, which `main` does not know: write `epochs`." if unknown else ""
    yield run.info.status != "FAILED", f"{named(run)} is FAILED: the command refused what it was given.{more}"
    yield finished(run)
    given = params.get("epochs")
    yield (
        _number(given) == EPOCHS,
        f"{named(run)} has `epochs = {given}`: {EPOCHS} are asked for, in `parameters`.",
    )
    setups = [each.data.params for each in evidence.runs if each.data.tags.get("setup") == "07.1"]
    commit = tags.get(MLFLOW_GIT_COMMIT, "")
    last = commit in {each.get("last_commit") for each in setups}
    yield (
        not last,
        f"{named(run)} ran the last commit, {commit[:8]}: `version` names the one before it. Without `version`, the "
        "last one is taken.",
    )
    yield (
        commit in {each.get("commit_before") for each in setups},
        f"{named(run)} ran commit {commit[:8] or 'unknown'}, which is not of this exercise's repository: use `address` "
        "and `commits` of the setup cell.",
    )
    yield (
        tags.get("git_dirty") != "true",
        f"{named(run)} has `git_dirty = true`: files were changed after the commit.",
    )
    return (
        f"`main` ran from the git address at commit {commit[:8]}, before the last one, with {EPOCHS} epochs. Anyone "
        "who can reach the address gets the same code."
    )


@exercise("07.2", "the same to the bit")
def the_same_to_the_bit(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run that repeats a run of the project."""
    given = run.data.tags.get("reproduces")
    by_project = " It is a project's run itself: tag the new one." if _is_project(run) else ""
    yield (
        bool(given),
        f"{named(run)} has no tag `reproduces`, with the id of the run that it repeats.{by_project or ' `reproduce` '}"
        f"{'' if by_project else 'of the lesson sets it.'}",
    )
    yield given != run.info.run_id, f"{named(run)} names itself in `reproduces`: the tag names the first run."
    first = evidence.run(given)
    yield (
        first is not None and first.info.experiment_id == run.info.experiment_id,
        f"{named(run)} has `reproduces = {given[:12]}`: no run of this experiment has that id.",
    )
    yield (
        _is_project(first),
        f"{named(run)} repeats {named(first)}, which is no run of the project: repeat that of exercise 07.1.",
    )
    yield finished(run)
    then, now = first.data.params, run.data.params
    # `reproduce` names the device that `auto` stood for.
    both = [name for name in then if name in now and name != "device"]
    other = [name for name in both if _number(then[name]) != _number(now[name])]
    yield (
        bool(both) and not other,
        f"{named(run)} has other parameters than {named(first)}: "
        + (listed(f"`{name}` {now[name]} and not {then[name]}" for name in other) if both else "none in common")
        + ".",
    )
    values = 0
    for metric in COMPARED:
        before, after = ([(p.step, p.value) for p in evidence.history(each, metric)] for each in (first, run))
        yield bool(before), f"{named(first)}, which {named(run)} repeats, has no `{metric}`: repeat a whole run."
        yield (
            len(before) == len(after),
            f"{named(run)} has {counted(len(after), 'value')} of `{metric}`, {named(first)} has {len(before)}.",
        )
        pair = next(((old, new) for old, new in zip(before, after, strict=True) if old != new), None)
        (step, old), (_, new) = pair or ((0, 0.0), (0, 0.0))
        yield (
            pair is None,
            f"`{metric}` of {named(run)} is {new:.9g} at step {step}, and {old:.9g} in {named(first)}: not the same to "
            "the bit. Has code, data or the number of CPU threads changed?",
        )
        values += len(before)
    return (
        f"All {values} values of {listed(f'`{each}`' for each in COMPARED)} are equal to the last bit. `differences` "
        "says what would have been other here: code, packages, data."
    )


@question("07")
def _own_source(evidence: Evidence) -> Question:
    """Ask about the learner's own run from a git address."""
    clean = [
        each
        for each in evidence.tagged("07.1")
        if _is_project(each) and each.data.tags.get(MLFLOW_GIT_COMMIT) and each.data.tags.get("git_dirty") == "false"
    ]
    name, commit = "committed", "4f2a91c0"
    if clean:
        name, commit = clean[0].info.run_name, clean[0].data.tags[MLFLOW_GIT_COMMIT][:8]
    return Question(
        f"Run `{name}` has commit {commit} and `git_dirty = false`. What does that say?",
        "it ran the files of that commit, unchanged",
        "The commit names the files, and `git_dirty` says that nothing was changed after it.",
        {
            "it ran the latest commit of the repository": "A commit before the last can be asked for, by `version`.",
            "its results are the same on every machine": "The code is. Processors and packages may round differently.",
            "its repository can't change any more": "Further commits can come. The run keeps the one that it had.",
        },
    )


@question("07")
def _wrong_name(evidence: Evidence) -> Question:
    return Question(
        "You start the entry point `train` of this project with the parameter `epoch=2`. What is in the store?",
        "a run that is FAILED",
        "MLflow opens the run and starts the command, which does not know `--epoch`.",
        {
            "nothing: MLflow refuses the name": "MLflow adds a name that it does not know to the command.",
            "a run with 2 epochs": "`epoch` is not `epochs`, and demo_lib does not guess.",
            "a run with 8 epochs, the default": "Then a wrong name would pass without a word.",
        },
    )


@question("07")
def _first_difference(evidence: Evidence) -> Question:
    return Question(
        "`reproduce` says: NOT the same, first `train_loss` at step 10: 1.93412 then, 1.93413 now. The commit and the "
        "data are the same. What is likely?",
        "another processor, or another version of PyTorch",
        "They add numbers in another order, which changes the last digits first.",
        {
            "another learning rate": "`reproduce` takes it from the run. And it would change much more.",
            "other training images": "Then the first losses would have little in common, and the digest would differ.",
            "a test image among the training images": "The data has the same digest, so the same images are in it.",
        },
    )
