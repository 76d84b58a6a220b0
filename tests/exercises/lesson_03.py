"""Attempts at the exercises of lesson 03."""

import mlflow

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_family

LIST, AGAIN = "03.1", "03.2"
TRIALS = [  # the first two are the shortlist
    {"channels": 8, "val_accuracy": 0.77},
    {"channels": 4, "val_accuracy": 0.84},
    {"channels": 8, "val_accuracy": 0.75},
    {"channels": 16, "val_accuracy": 0.86},
    {"channels": 32, "val_accuracy": 0.88},
    {"channels": 8, "val_accuracy": 0.9, "status": "KILLED"},
    {"channels": 4, "val_accuracy": 0.6},
    {"channels": 24, "val_accuracy": 0.7},
]


def shortlist(*numbers, parent=False):
    """Make a study and tag some of its trials."""
    above, ids = log_family(LIST, TRIALS)
    for run_id in [ids[number] for number in numbers] + [above] * parent:
        mlflow.MlflowClient().set_tag(run_id, "exercise", LIST)
    return ids


@wrong("03.1", r"2 of 4 tagged runs are too wide: .*has 32.* has 16 channels\. .*as text '16' comes before '8'")
def channels_compared_as_text():
    shortlist(0, 1, 3, 4)


@wrong("03.1", r"run `search` .* is tagged, and it is the parent")
def the_parent_not_left_out():
    shortlist(0, 1, parent=True)


@wrong("03.1", r"1 of 3 tagged runs is not FINISHED: run `trial 5` .* is KILLED")
def whatever_its_status():
    shortlist(0, 1, 5)


@wrong("03.1", r"1 of 3 tagged runs is not above 0\.75: run `trial 2` .* has `val_accuracy` 0\.75\.")
def at_least_instead_of_more():
    shortlist(0, 1, 2)


@wrong("03.1", r"1 run of the shortlist has no tag: one with 0\.77 and 8 channels")
def less_than_eight_channels():
    shortlist(1)


@wrong("03.1", r"is no trial of the study that the setup cell made")
def a_run_of_another_study():
    with mlflow.start_run(tags={"exercise": LIST}):
        mlflow.log_param("channels", 8)
        mlflow.log_metric("val_accuracy", 0.8)


@two_sittings("03.1")
def one_tag_today_one_tomorrow():
    ids = shortlist(0)
    yield
    mlflow.MlflowClient().set_tag(ids[1], "exercise", LIST)


FOUR = [
    {"learning_rate": 0.0123456789, "log_every": 10, "val_accuracy": 0.8},
    {"learning_rate": 0.0031415926, "log_every": 10, "val_accuracy": 0.7},
    {"learning_rate": 0.0011, "log_every": 10, "val_accuracy": 0.5},
    {"learning_rate": 0.0002, "log_every": 10, "val_accuracy": 0.2},
]


def again(number, name="", loss=0.5, tag=True, **params):
    """Make the family and a copy of one of its runs, with other parameters or another loss."""
    _, ids = log_family(AGAIN, FOUR)
    values = {key: value for key, value in FOUR[number].items() if key != "val_accuracy"} | params
    with mlflow.start_run(tags={"exercise": AGAIN} | ({"repeats": name or ids[number]} if tag else {})):
        mlflow.log_params(values)
        mlflow.log_metrics({"val_accuracy": FOUR[number]["val_accuracy"], "val_loss": loss})
    return ids


@wrong("03.2", r"repeats run `trial 0` .*, number 1 of 4 by `val_accuracy` \(0\.800\): the second best has 0\.700")
def the_best_instead():
    again(0)


@wrong("03.2", r"has `learning_rate = 0\.003142`, and run `trial 1` .* `0\.0031415926`")
def a_rounded_learning_rate():
    again(1, learning_rate=0.003142)


@wrong("03.2", r"has `log_every = 5`, and run `trial 1` .* `10`")
def another_log_every():
    again(1, log_every=5)


@wrong("03.2", r"has no tag `repeats`, the id of the run that it repeats")
def not_said_what_it_repeats():
    again(1, tag=False)


@wrong("03.2", r"has `repeats = trial 1`: no run has this id, though run `trial 1` .* may be meant")
def the_name_instead_of_the_id():
    again(1, name="trial 1")


@wrong("03.2", r"has the parameters of run `trial 1` .*, but `val_loss` at step 0 is 0\.5000001 and was 0\.5")
def other_losses():
    again(1, loss=0.5000001)


@two_sittings("03.2")
def said_tomorrow_what_it_repeats():
    ids = again(1, tag=False)
    copy = mlflow.search_runs(filter_string="tags.exercise = '03.2'", output_format="list")[0]
    yield
    mlflow.MlflowClient().set_tag(copy.info.run_id, "repeats", ids[1])
