"""Attempts at the exercises of lesson 07."""

import mlflow

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import setup_runs

BEFORE, LAST = "b" * 40, "a" * 40
ADDRESS = "file:///tmp/made/up/project"
VALUES = {"train_loss": (2.1, 1.7), "val_loss": (2.2, 1.6), "val_accuracy": (0.3, 0.5)}
ASKED = {"train_images": "600", "epochs": "2", "learning_rate": "0.012", "flip": "false", "device": "auto"}
AGAIN = ASKED | {"flip": "False", "device": "cpu"}  # as demo_lib writes them


def commits():
    """Return the commit before the last, and the last one; make the setup's run if it is not there."""
    if not setup_runs("07.1"):
        with mlflow.start_run(tags={"setup": "07.1"}):
            mlflow.log_params({"last_commit": LAST, "commit_before": BEFORE})
    params = setup_runs("07.1")[-1].data.params
    return params["commit_before"], params["last_commit"]


def training(tags, params, change=0.0):
    with mlflow.start_run(tags=tags) as run:
        mlflow.log_params(params)
        for metric, values in VALUES.items():
            for step, value in zip((5, 10), values, strict=True):
                mlflow.log_metric(metric, value + change, step=step)
    return run.info.run_id


def project(commit, entry_point="main", source=ADDRESS, dirty="false", exercise="07.1", **params):
    """Log what `mlflow.projects.run` leaves."""
    tags = {"mlflow.source.type": "PROJECT", "mlflow.project.entryPoint": entry_point, "mlflow.source.name": source}
    tags |= {"mlflow.source.git.commit": commit, "git_dirty": dirty} | ({"exercise": exercise} if exercise else {})
    return training(tags, ASKED | params)


@wrong("07.1", r"ran the files in the folder `copy`, whatever was changed there: give .* the git address")
def the_folder():
    project(commits()[1], source="/tmp/made/up/copy", dirty="true")


@wrong("07.1", r"ran the last commit, \w{8}: `version` names the one before it")
def no_version():
    project(commits()[1])


@wrong("07.1", r"is FAILED: the command refused.*parameter `epoch`, which `main` does not know: write `epochs`")
def epoch_without_s():
    run_id = project(commits()[0], epochs="8", epoch="2")
    mlflow.MlflowClient().set_terminated(run_id, "FAILED")


@wrong("07.1", r"ran the entry point `train`: `main` is asked for")
def as_in_the_lesson():
    project(commits()[0], entry_point="train")


@wrong("07.1", r"has `epochs = 8`: 2 are asked for")
def epochs_forgotten():
    project(commits()[0], epochs="8")


@wrong("07.1", r"ran commit cccccccc, which is not of this exercise's repository")
def a_commit_of_another_repository():
    commits()
    project("c" * 40)


@wrong("07.1", r"was not made by `mlflow run` or `mlflow\.projects\.run`: its source is \w+")
def trained_in_the_notebook():
    training({"exercise": "07.1", "git_dirty": "false"}, ASKED)


@two_sittings("07.1")
def the_tag_tomorrow():
    run_id = project(commits()[0], exercise=None)
    yield
    mlflow.MlflowClient().set_tag(run_id, "exercise", "07.1")


def again(first, change=0.0, **params):
    return training({"exercise": "07.2", "reproduces": first}, AGAIN | params, change)


@wrong("07.2", r"has no tag `reproduces`, with the id of the run that it repeats\. `reproduce` of the lesson")
def trained_by_hand():
    training({"exercise": "07.2"}, AGAIN)


@wrong("07.2", r"`train_loss` of run .* is 2\.101 at step 5, and 2\.1 in run .*: not the same to the bit")
def changed_code():
    again(project(commits()[0]), change=0.001)


@wrong("07.2", r"has other parameters than run .*: `learning_rate` 0\.02 and not 0\.012")
def another_learning_rate():
    again(project(commits()[0]), learning_rate="0.02")


@wrong("07.2", r"names itself in `reproduces`: the tag names the first run")
def itself():
    client, run_id = mlflow.MlflowClient(), project(commits()[0], exercise="07.2")
    client.set_tag(run_id, "reproduces", run_id)


@wrong("07.2", r"has no tag `reproduces`.* It is a project's run itself: tag the new one")
def the_tag_on_the_first_run():
    project(commits()[0], exercise="07.2")


@wrong("07.2", r"repeats run .*, which is no run of the project: repeat that of exercise 07\.1")
def some_other_run():
    again(training({}, ASKED))


@wrong("07.2", r"has `reproduces = spiffy-smelt`: no run of this experiment has that id")
def the_name_instead_of_the_id():
    again("spiffy-smelt")


@two_sittings("07.2")
def repeated_tomorrow():
    first = project(commits()[0])
    yield
    again(first)
