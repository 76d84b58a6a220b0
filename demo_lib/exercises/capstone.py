"""What the last exercise expects of a training of the learner's own: ten points, each for itself."""

import math
from collections.abc import Iterable

from demo_lib.exercises.evidence import Evidence, model_id
from demo_lib.exercises.judging import Expectations, counted, exercise, listed, named
from demo_lib.exercises.quiz import Question, best_and_others, question

from mlflow.entities import LoggedModel, Run
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

CHILDREN, PARAMS, STEPS = 4, 2, 3
MOST = 30  # children that are looked at: a check is quick
LOWER = ("loss", "error", "mae", "mse", "rmse", "perplexity")  # what is better the lower it is
FIGURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".html")
ENDED = ("FINISHED", "KILLED", "FAILED")

Point = tuple[bool, str]


@exercise("09.2", "a training of your own", attempts=Evidence.tops, rubric=True)
def a_training_of_your_own(run: Run, evidence: Evidence) -> Expectations:
    """Judge a parent run by ten points, none of which needs another one."""
    children = evidence.children(run)[:MOST]
    winner = next((child for child in children if child.info.run_id == run.data.tags.get("best_run_id")), None)
    family = [run, *children]
    models = [model for each in ([winner, run] if winner else family) for model in evidence.models(each)]
    points = [
        _family(run, children),
        _parameters(children),
        _histories(children, evidence),
        _data(run, children),
        _origin(children),
        _winner(run, winner, children, evidence),
        _model(models, evidence),
        _test_score(family, models, evidence),
        _figure(run, evidence),
        _version(family, models, evidence),
    ]
    yield from points
    met = sum(ok for ok, _ in points)
    if met < len(points):
        return f"{named(run)} meets {met} of {len(points)} points."
    return (
        f"{named(run)} meets all {len(points)} points: another person can find the best model, see how it was chosen, "
        "and train it again. Now do the same for your next training at work."
    )


def _family(run: Run, children: list[Run]) -> Point:
    ended = [child for child in children if child.info.status in ENDED]
    met = run.info.status == "FINISHED" and len(ended) >= CHILDREN
    have = f"{run.info.status} with {counted(len(ended), 'child', 'children')} that ended"
    return met, f"Family: a FINISHED parent with {CHILDREN} or more ended children. Found: {have}."


def _parameters(children: list[Run]) -> Point:
    few = [child for child in children if len(child.data.params) < PARAMS]
    sets = {tuple(sorted(child.data.params.items())) for child in children}
    met = len(children) > 1 and not few and len(sets) == len(children)
    if few:
        found = f"{named(few[0])} has {counted(len(few[0].data.params), 'parameter')}"
    else:
        found = f"{counted(len(children), 'child', 'children')} with {counted(len(sets), 'choice')} of parameters"
    return met, f"Parameters: each child has {PARAMS} or more, and no two children the same values. Found: {found}."


def _is_history(child: Run, metric: str, evidence: Evidence) -> bool:
    return len({point.step for point in evidence.history(child, metric)}) >= STEPS


def _validation(run: Run) -> list[str]:
    return sorted(name for name in run.data.metrics if name.startswith("val_"))


def _histories(children: list[Run], evidence: Evidence) -> Point:
    short = [
        child for child in children if not any(_is_history(child, metric, evidence) for metric in _validation(child))
    ]
    found = f"{len(children) - len(short)} of {counted(len(children), 'child', 'children')}"
    if short:
        steps = {
            name: len({point.step for point in evidence.history(short[0], name)}) for name in _validation(short[0])
        }
        have = [f"`{name}` at {counted(count, 'step')}" for name, count in steps.items()]
        found += f"; {named(short[0])} has {listed(have)}"
    met = bool(children) and not short
    return met, f"History: each child has a metric `val_...` at {STEPS} or more steps. Found: {found}."


def _has_data(run: Run) -> bool:
    return bool(run.inputs and run.inputs.dataset_inputs)


def _data(run: Run, children: list[Run]) -> Point:
    have = [child for child in children if _has_data(child)]
    met = _has_data(run) or (bool(children) and len(have) == len(children))
    found = "the parent has one" if _has_data(run) else f"{len(have)} of {counted(len(children), 'child', 'children')}"
    return met, f"Data: the parent or each child has a dataset as input, by `mlflow.log_input`. Found: {found}."


def _origin(children: list[Run]) -> Point:
    def known(child: Run) -> bool:
        return MLFLOW_GIT_COMMIT in child.data.tags or "seed" in child.data.tags.keys() | child.data.params.keys()

    have = [child for child in children if known(child)]
    met = bool(children) and len(have) == len(children)
    return met, (
        "Origin: each child has a commit (tag `mlflow.source.git.commit`) or a `seed`, as parameter or tag. "
        f"Found: {len(have)} of {counted(len(children), 'child', 'children')}."
    )


def _best(children: Iterable[Run], evidence: Evidence) -> dict[str, set[str]]:
    """Return for each validation metric the ids of the children that are best, at their end or at any step."""
    found: dict[str, set[str]] = {}
    whole = [child for child in children if child.info.status == "FINISHED"]
    for metric in {name for child in whole for name in _validation(child)}:
        sign = -1 if any(word in metric.lower() for word in LOWER) else 1
        last, ever = {}, {}
        for child in whole:
            values = [sign * p.value for p in evidence.history(child, metric) if not math.isnan(p.value)]
            if values:
                last[child.info.run_id], ever[child.info.run_id] = values[-1], max(values)
        found[metric] = {
            run_id
            for values_of in (last, ever)
            for run_id, value in values_of.items()
            if value == max(values_of.values())
        }
    return found


def _winner(run: Run, winner: Run | None, children: list[Run], evidence: Evidence) -> Point:
    given, best = run.data.tags.get("best_run_id"), _best(children, evidence)
    met = winner is not None and any(winner.info.run_id in ids for ids in best.values())
    if met:
        found = named(winner)
    elif given is None:
        found = "no such tag"
    elif winner is None:
        found = f"`{given[:12]}`, which is the id of none of its children"
    else:
        right = listed(named(child) for child in children if any(child.info.run_id in ids for ids in best.values()))
        found = f"{named(winner)}, but the best is {right}"
    return met, (
        "Winner: the parent's tag `best_run_id` is the id of the FINISHED child with the best `val_...` metric. "
        f"Found: {found}."
    )


def _model(models: list[LoggedModel], evidence: Evidence) -> Point:
    found = "no model" if not models else ""
    met = False
    for model in models:
        if (about := evidence.description(model)) is None:
            found = found or f"`{model.name}`, whose description can't be read"
            continue
        parts = {"signature": about.signature is not None, "input example": bool(about.saved_input_example_info)}
        lacking = listed(part for part, there in parts.items() if not there)
        if all(parts.values()):
            met, found = True, f"`{model.name}` has both"
            break
        found = found or f"`{model.name}` without {lacking}"
    return met, f"Model: the winner or the parent logged one with signature and input example. Found: {found}."


def _test_score(family: list[Run], models: list[LoggedModel], evidence: Evidence) -> Point:
    tested = {(each.info.run_name, name) for each in family for name in each.data.metrics if name.startswith("test_")}
    runs = [each for each in family if any(name.startswith("test_") for name in each.data.metrics)]
    values = {
        name: {point.value for point in evidence.history(each, name)}
        for each in runs[:1]
        for name in each.data.metrics
        if name.startswith("test_")
    }
    often = [name for name, different in values.items() if len(different) > 1]
    on_model = {metric.key for model in models for metric in model.metrics or () if metric.key.startswith("test_")}
    met = len(runs) < 2 and not often and bool(on_model)
    if len(runs) > 1:
        found = f"{len(runs)} runs have one, so the test data helped to choose"
    elif often:
        found = f"`{often[0]}` has {len(values[often[0]])} different values"
    elif on_model:
        found = f"{listed(f'`{name}`' for name in sorted(on_model))}, on the model"
    else:
        found = "it is on the run alone, without `model_id`" if tested else "none"
    return met, f"Test score: one metric `test_...`, logged once, for the winner's model. Found: {found}."


def _figure(run: Run, evidence: Evidence) -> Point:
    files = evidence.files(run)
    for folder in [each.path for each in files if each.is_dir][:5]:
        files = [*files, *evidence.files(run, folder)]
    figures = [each.path for each in files if each.path.lower().endswith(FIGURES)]
    found = f"`{figures[0]}`" if figures else listed(f"`{each.path}`" for each in files if not each.is_dir)
    return bool(figures), f"Figure: the parent's files have one, such as a `.png`. Found: {found}."


def _version(family: list[Run], models: list[LoggedModel], evidence: Evidence) -> Point:
    ids = {model.model_id for model in models}
    versions = [each for each in evidence.versions_of(family) if model_id(each) in ids]
    said = [each for each in versions if (each.description or "").strip()]
    champions = [each for each in versions if evidence.aliases(each.name).get("champion") == str(each.version)]
    good = [*said, *champions]
    found = named((good or versions)[0]) if versions else "none"
    if versions and not good:
        found += ", which has neither"
    return bool(good), (
        f"Version: the model is registered, and the version has a description or the alias `champion`. Found: {found}."
    )


@question("09")
def _own_choice(evidence: Evidence) -> Question:
    """Ask about the learner's own family."""
    for run in evidence.tops("09.2"):
        children = evidence.children(run)
        metric = next((name for child in children for name in _validation(child)), None)
        if len(children) < CHILDREN or metric is None:
            continue
        low = any(word in metric.lower() for word in LOWER)
        final = {child.info.run_name: child.data.metrics.get(metric, math.nan) for child in children}
        if ranked := best_and_others(final, lowest=low):
            (best, value), others = ranked
            return Question(
                f"Which child of your run `{run.info.run_name}` ended with the {'lowest' if low else 'highest'} "
                f"`{metric}`?",
                f"`{best}`",
                f"It ended with {value:.4g}.",
                {f"`{name}`": f"It ended with {other:.4g}, and one of the others is better." for name, other in others},
            )
    return Question(
        "You tried 20 settings and keep the best. Where does the tag `best_run_id` belong?",
        "on the parent run of the 20",
        "Whoever opens the study finds its winner there.",
        {
            "on the winner itself": "Then one must find the winner before one can read it.",
            "on each of the 20 runs": "It says the same 20 times, and must be written 20 times.",
            "on the registered version": "A version knows the run that made it already.",
        },
    )


@question("09")
def _once(evidence: Evidence) -> Question:
    return Question(
        "Four children each log `test_accuracy`, and you register the one where it is highest. What is wrong?",
        "the test data made the choice",
        "Its best value is partly luck, and nothing is left that says how good the model really is.",
        {
            "the metric must be called `val_accuracy`": "A name does not change which data a value comes from.",
            "four values of one name can't be compared": "They can: the list of runs sorts by them.",
            "only a parent may have test metrics": "Any run may have any metric.",
        },
    )


@question("09")
def _a_year_later(evidence: Evidence) -> Question:
    return Question(
        "A year later you want to train your champion again. Its run has all parameters, the packages' versions and "
        "the digest of the data. What else do you need most?",
        "the commit of the code, with nothing changed after it",
        "Parameters only say what the code was given.",
        {
            "the figure with the loss curves": "It shows how the training went, not how to do it.",
            "the name of the registered model": "It leads to the weights, which you would have anyway.",
            "the number of the version": "It counts what was registered, and says nothing of the code.",
        },
    )
