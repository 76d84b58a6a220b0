"""Attempts at the exercises of lesson 05: synthetic versions, as training and judging models takes long."""

from itertools import count

import mlflow
from mlflow.exceptions import MlflowException

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_model

GATE, BACK, TRACE = "05.1", "05.2", "05.3"
WHY = "it is right on 80.0% of 5,000 images, version 1 on 74.0%, and the gate asks for 0.5 points more"
ONCE = {"decision": "promoted", "reason": WHY, "champion_version": "1"}
RUN_TAGS = {"data_digest": "0123456789abcdef", "mlflow.source.git.commit": "c0ffee" * 6 + "c0de"}
numbers = count()


def new_name():
    """Register a model's name that no attempt has used."""
    client = mlflow.MlflowClient()
    while True:
        try:
            return client.create_registered_model(f"attempt-{next(numbers)}").name
        except MlflowException:
            continue


def register(name, images=1_000, model="classifier", **tags):
    """Log a run with a model, register it, and return the version."""
    with mlflow.start_run(tags=RUN_TAGS) as run:
        mlflow.log_param("train_images", images)
        logged = log_model(model)
    source = f"models:/{logged.model_id}"
    return mlflow.MlflowClient().create_model_version(name, source, run.info.run_id, tags, model_id=logged.model_id)


def champion(name, version, alias="champion"):
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version.version)


def tag(version, **tags):
    for key, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(version.name, version.version, key, value)


def candidate(images=2_000, model="classifier", **tags):
    """Register a first champion, and a version that is an attempt."""
    name = new_name()
    champion(name, register(name))
    return register(name, images, model, exercise=GATE, **tags)


@wrong("05.1", r"version 2 of .* is the champion, and has no tag `decision`: the alias was moved by hand")
def the_alias_by_hand():
    version = candidate()
    champion(version.name, version)


@wrong("05.1", r"is the model `best_model` of its run, and `promote` can't judge it")
def the_network_registered():
    candidate(model="best_model")


@wrong("05.1", r"has `decision = refused`: .*it was trained on 1,000 images, version 1 on 1,000: twice as many")
def the_old_configuration():
    candidate(1_000, **ONCE | {"decision": "refused"})


@wrong("05.1", r"has no tag `decision`: nobody asked `promote` about it")
def promote_not_asked():
    candidate()


@wrong("05.1", r"was promoted, but it was trained on 1,000 images, version 1 on 1,000: twice as many")
def more_epochs_instead():
    candidate(1_000, **ONCE)


@wrong("05.1", r"was promoted as there was no champion: run the setup cell first")
def the_first_champion():
    register(new_name(), exercise=GATE, **ONCE | {"champion_version": ""})


@two_sittings("05.1")
def promoted_tomorrow():
    version = candidate()
    yield
    tag(version, **ONCE)
    champion(version.name, version)


def blamed():
    """Register a former champion, which has the alias `previous`, and the champion that users complain about."""
    name = new_name()
    good, bad = register(name), register(name, exercise=BACK)
    champion(name, good, "previous")
    champion(name, bad)
    return good, bad


REFUSED = {"decision": "refused", "reason": "it was rolled back (users complained)"}


@wrong("05.2", r"version 2 of .* is still the champion: move the alias")
def the_tag_alone():
    _, bad = blamed()
    tag(bad, rolled_back="users complained")


@wrong("05.2", r"has no tag `rolled_back`: without it, `promote` would take the blamed version again")
def the_alias_alone():
    good, _ = blamed()
    champion(good.name, good)


@wrong("05.2", r"has no tag `rolled_back`, but version 1, the good one, has it")
def the_tag_on_the_good_one():
    good, _ = blamed()
    champion(good.name, good)
    tag(good, rolled_back="users complained")


@wrong("05.2", r"has the tag `rolled_back`, but no tag `decision`: ask `promote` about it now")
def promote_not_asked_again():
    good, bad = blamed()
    champion(good.name, good)
    tag(bad, rolled_back="users complained")


@wrong("05.2", r"was refused, but not for the rollback: it is right on 80\.0%.* Set the tag first")
def promote_asked_before_the_tag():
    good, bad = blamed()
    champion(good.name, good)
    tag(bad, decision="refused", reason=WHY, rolled_back="users complained")


@wrong("05.2", r"version 1 of .* is the champion, and no other version is left: was the blamed one deleted")
def the_blamed_version_deleted():
    good, bad = blamed()
    champion(good.name, good)
    mlflow.MlflowClient().delete_model_version(bad.name, bad.version)
    tag(good, exercise=BACK)


@wrong("05.2", r"no version of .* is the champion now: set the alias on the one before")
def the_alias_deleted():
    _, bad = blamed()
    mlflow.MlflowClient().delete_registered_model_alias(bad.name, "champion")


@two_sittings("05.2")
def promote_asked_again_tomorrow():
    good, bad = blamed()
    champion(good.name, good)
    tag(bad, rolled_back="users complained")
    yield
    tag(bad, **REFUSED)


def traced(newest=False, **wrong_tags):
    """Register a champion and a newer version, and trace one of them."""
    name = new_name()
    first, second = register(name), register(name)
    champion(name, first)
    version = second if newest else first
    right = {"trace_run": version.run_id, "trace_commit": RUN_TAGS["mlflow.source.git.commit"]}
    right |= {"trace_data": RUN_TAGS["data_digest"], "exercise": TRACE}
    tag(version, **right | wrong_tags)
    return version


@wrong("05.3", r"version 2 of .* is not the champion, which is version 1\. It is newer")
def the_newest_version():
    traced(newest=True)


@wrong("05.3", r"has `trace_run = m-\w+`: that is the id of the model: one step is left, its `source_run_id`")
def the_model_instead_of_the_run():
    version = traced()
    tag(version, trace_run=version.source.removeprefix("models:/"))


@wrong("05.3", r"has `trace_commit = c0ffeec0ff`, and its run `c0ffee.*only the beginning")
def a_short_commit():
    traced(trace_commit="c0ffeec0ff")


@wrong("05.3", r"has `trace_data = \w{8}`: that is MLflow's digest of one split\. And its run has `data_digest")
def the_digest_of_the_dataset():
    from mlflow.data.numpy_dataset import from_numpy
    from numpy import zeros

    version, dataset = traced(), from_numpy(zeros(3), name="fashion-mnist")
    with mlflow.start_run(run_id=version.run_id):
        mlflow.log_input(dataset, "training")
    tag(version, trace_data=dataset.digest)


@wrong("05.3", r"has no tag `trace_commit` and no `trace_data`\. The run has it: here the version tells")
def the_tags_on_the_run():
    name = new_name()
    version = register(name, exercise=TRACE, trace_run="?")
    champion(name, version)
    with mlflow.start_run(run_id=version.run_id):
        mlflow.set_tags({"trace_commit": "c0ffee", "trace_data": "0123"})


@two_sittings("05.3")
def the_data_tomorrow():
    version = traced(trace_data="")
    yield
    tag(version, trace_data=RUN_TAGS["data_digest"])
