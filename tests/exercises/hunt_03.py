"""Attempts at the hunts 03.3 and 09.1. Those at one exercise share a hunt, so they are quick beside each other."""

from itertools import count

from demo_lib.exercises import hunt
from demo_lib.exercises.faults import plan

import mlflow

from tests.exercises.attempts import two_sittings, wrong


def first_seed(faults, *kinds, without=()):
    """Return a seed, far from those of the notebooks, whose hunt has these kinds."""
    for seed in count(100):
        there = {run.fault for run in plan(seed, faults)}
        if there.issuperset(kinds) and not there & {*without}:
            return seed


SMALL = first_seed(6, "no_parent", "twice", "left_running", without=["nan_loss"])
LARGE = first_seed(10, "percent", "wrong_rate", without=["worse_alias"])


def tag(seed, faults, kinds):
    """Tag the runs of these names."""
    hunt(seed, faults)
    for run in mlflow.search_runs(filter_string=f"tags.hunt = '{seed}'", output_format="list"):
        if run.info.run_name in kinds:
            mlflow.MlflowClient().set_tag(run.info.run_id, "fault", kinds[run.info.run_name])


def accuse(seed, faults, kind, wanted, most=None):
    """Tag the runs of the plan for which `wanted` holds, or the first of them."""
    tag(seed, faults, {run.name: kind for run in [*filter(wanted, plan(seed, faults))][:most]})


def solve(seed, faults, part=slice(None)):
    """Tag the runs that are guilty of this part of the kinds."""
    kinds = sorted({run.fault for run in plan(seed, faults)} - {None})[part]
    tag(seed, faults, {run.name: run.fault for run in plan(seed, faults) if run.fault in kinds})


def is_lost(run):
    return run.tags.get("error", "").startswith("ValueError")


@wrong("03.3", r"0 of 6 faults.*No fault: run .* tagged `nan_loss`, but it is FAILED, so its status tells of the NaN")
def a_nan_that_the_status_tells_of():
    accuse(SMALL, 6, "nan_loss", is_lost)


@wrong("03.3", r"has `fault = running`, which is no kind: do you mean `left_running`?")
def the_kind_in_other_words():
    accuse(SMALL, 6, "running", lambda run: run.fault == "left_running")


@wrong("03.3", r"0 of 6 .* with 1 of \d+ guilty runs\. Still hidden: of `no_parent` you have 1 of 2 runs")
def one_of_two_children():
    accuse(SMALL, 6, "no_parent", lambda run: run.fault == "no_parent", 1)


@wrong("03.3", r"No fault: run .* tagged `no_parent`, but it is the run of a study")
def the_tag_on_the_parent():
    accuse(SMALL, 6, "no_parent", lambda run: "trials" in run.params, 1)


@wrong("03.3", r"tagged `twice`, but it is the earlier of the two")
def the_original_for_the_copy():
    copy = next(run for run in plan(SMALL, 6) if run.fault == "twice")
    accuse(SMALL, 6, "twice", lambda run: run.points == copy.points and run is not copy)


@two_sittings("03.3")
def half_of_the_kinds_tomorrow():
    solve(SMALL, 6, slice(3))
    yield
    solve(SMALL, 6, slice(3, None))


@wrong("09.1", r"Wrong kind: run .* is guilty, but not of `wrong_rate`")
def the_wrong_kind():
    accuse(LARGE, 10, "wrong_rate", lambda run: run.fault == "percent", 1)


@wrong("09.1", r"tagged `worse_alias`, but its version has the highest `test_accuracy` of all")
def the_champion_without_looking():
    accuse(LARGE, 10, "worse_alias", lambda run: run.champion)


@wrong("09.1", r"tagged `cut_short`, but it is KILLED, so it does not claim all epochs\. \d more like this")
def every_short_run():
    accuse(LARGE, 10, "cut_short", lambda run: run.status == "KILLED")


@wrong("09.1", r"tagged `twice`, but `.*` has another seed")
def the_same_settings_with_another_seed():
    accuse(LARGE, 10, "twice", lambda run: run.params.get("seed") == 6)


@wrong("09.1", r"5 of 10 faults are found, with \d+ of \d+ guilty runs\. Still hidden: something about ")
def half_of_the_kinds():
    solve(LARGE, 10, slice(5))


@two_sittings("09.1")
def the_rest_of_the_kinds_tomorrow():
    solve(LARGE, 10, slice(5))
    yield
    solve(LARGE, 10, slice(5, None))
