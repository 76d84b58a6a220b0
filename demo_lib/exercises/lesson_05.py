"""What the exercises of lesson 05 expect: a promotion, a rollback, and the way back to where a version came from."""

from demo_lib.exercises.evidence import Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

COMMIT = "mlflow.source.git.commit"


def _images(run: Run | None) -> int:
    """Return the parameter `train_images`, 0 if it is not there or no whole number."""
    given = run.data.params.get("train_images", "") if run else ""
    return int(given) if given.isdecimal() else 0


def _again(version: ModelVersion, evidence: Evidence) -> str:
    """Say how the setup's version becomes the champion again."""
    made = [each for each in evidence.versions_of(evidence.runs) if each.name == version.name]
    first = next((each for each in made if each.tags.get("setup") == "05.1" and each.version != version.version), None)
    if first is None:
        return "Run the setup cell again"
    call = f'client.set_registered_model_alias(name, "champion", {first.version})'
    return f"Give the alias back to the first version, by `{call}`"


@exercise("05.1", "past the gate", attempts=Evidence.versions)
def past_the_gate(version: ModelVersion, evidence: Evidence) -> Expectations:
    """Judge a version that is to be promoted for more images; where the alias is now does not matter."""
    tags, model, who = version.tags, evidence.model_of(version), named(version)
    undecided = "decision" not in tags
    is_champion = undecided and evidence.aliases(version.name).get("champion") == str(version.version)
    yield (
        not is_champion,
        f"{who} is the champion, and has no tag `decision`: the alias was moved by hand. {_again(version, evidence)}, "
        "and let `promote` decide about this one.",
    )
    yield (
        not undecided or model is None or model.name == "classifier",
        f"{who} is the model `{model and model.name}` of its run, and `promote` can't judge it. Register the classifier"
        " around the network: `model_uri` of what `train_classifier` returns.",
    )
    yield not undecided, f"{who} has no tag `decision`: nobody asked `promote` about it."
    number, of_id = tags.get("champion_version", ""), {run.info.run_id: run for run in evidence.runs}
    former = evidence.version(version.name, number)
    run, before = of_id.get(version.run_id), of_id.get(former.run_id) if former else None
    sizes = f"it was trained on {_images(run):,} images, version {number} on {_images(before):,}"
    few = not 0 < 2 * _images(before) <= _images(run)
    yield (
        tags["decision"] == "promoted",
        f"{who} has `decision = {tags['decision'][:20]}`: {tags.get('reason', 'without a reason')[:160]}."
        + (f" And {sizes}: twice as many are asked for." if few else ""),
    )
    yield (
        bool(number),
        f"{who} was promoted as there was no champion: run the setup cell first, then train a better one.",
    )
    yield (
        before is not None,
        f"{who} was promoted, but version {number[:20]}, the champion before, or its run is not there any more: run "
        "the setup cell, and promote a new one.",
    )
    yield (
        not few,
        f"{who} was promoted, but {sizes}: twice as many are asked for. {_again(version, evidence)}, and let "
        "`promote` decide about a version with twice the images of that one.",
    )
    return (
        f"{who} was promoted past version {number}, with {_images(run):,} images against {_images(before):,}. Its tags "
        "say how it came to this: open the version's page in the UI."
    )


@exercise("05.2", "roll back", attempts=Evidence.versions)
def roll_back(version: ModelVersion, evidence: Evidence) -> Expectations:
    """Judge the blamed version, which is to be refused from now on."""
    tags, who = version.tags, named(version)
    champion = evidence.aliases(version.name).get("champion")
    is_champion = champion == str(version.version)
    alone = is_champion and len(evidence.search_versions(f'name = "{version.name}"')) == 1
    yield (
        not alone,
        f"{who} is the champion, and no other version is left: was the blamed one deleted? Then nobody can see what "
        "was wrong. Run the setup cell, and keep the version this time.",
    )
    yield (
        not is_champion,
        f"{who} is still the champion: move the alias `champion` to the version that has the alias `previous`.",
    )
    yield (
        champion is not None,
        f"no version of `{version.name}` is the champion now: set the alias on the one before, don't delete it.",
    )
    good = None if "rolled_back" in tags else evidence.version(version.name, champion)
    blamed_good = f", but version {champion}, the good one, has it" if good and "rolled_back" in good.tags else ""
    yield (
        "rolled_back" in tags,
        f"{who} has no tag `rolled_back`{blamed_good}: without it, `promote` would take the blamed version again.",
    )
    decided = f"`decision = {tags['decision'][:20]}`, from before" if "decision" in tags else "no tag `decision`"
    yield (
        tags.get("decision") == "refused",
        f"{who} has the tag `rolled_back`, but {decided}: ask `promote` about it now, and see that it is refused.",
    )
    reason = tags.get("reason", "")
    yield (
        reason.startswith("it was rolled back"),
        f"{who} was refused, but not for the rollback: {reason[:160]}. Set the tag first, then ask `promote` again.",
    )
    return (
        f"Version {champion} is back, and {who} is refused: {reason[:100]}. An application that loads "
        f"`models:/{version.name}@champion` gets the good one at its next start."
    )


@exercise("05.3", "the way back", attempts=Evidence.versions)
def the_way_back(version: ModelVersion, evidence: Evidence) -> Expectations:
    """Judge the champion's version, which is to say where it comes from."""
    tags, who, run = version.tags, named(version), evidence.run(version.run_id)
    champion = evidence.aliases(version.name).get("champion")
    newer = (
        " It is newer, but the newest version is not always the champion."
        if int(version.version) > int(champion or 0)
        else ""
    )
    yield (
        champion == str(version.version),
        f"{who} is not the champion, which is version {champion}.{newer} Ask for the version that has the alias.",
    )
    yield run is not None, f"the run of {who} is deleted: restore it in the MLflow UI."
    asked = ("trace_run", "trace_commit", "trace_data")
    missing = [f"`{tag}`" for tag in asked if tag not in tags]
    where = " The run has it: here the version tells." if any(tag in run.data.tags for tag in asked) else ""
    yield not missing, f"{who} has no tag {' and no '.join(missing)}.{where}"
    given, model = tags["trace_run"], evidence.model_of(version)
    kind = "no run of this version"
    if model and given in (model.model_id, version.source):
        kind = "the id of the model: one step is left, its `source_run_id`"
    elif given == run.info.run_name:
        kind = "the run's name, which another run may have, too"
    yield given == run.info.run_id, f"{who} has `trace_run = {given[:40]}`: that is {kind}."
    given, commit = tags["trace_commit"], run.data.tags.get(COMMIT, "unknown")
    kind = (
        "only the beginning, and the whole is asked for"
        if given and commit.startswith(given)
        else f"not the tag `{COMMIT}`"
    )
    yield given == commit, f"{who} has `trace_commit = {given[:40]}`, and its run `{commit[:40]}`: that is {kind}."
    given, digest = tags["trace_data"], run.data.tags.get("data_digest", "unknown")
    datasets = run.inputs.dataset_inputs if run.inputs else []
    of = [each.dataset.name for each in datasets if each.dataset.digest == given]
    kind = "that is MLflow's digest of one split. And " if of else ""
    yield (
        given == digest,
        f"{who} has `trace_data = {given[:40]}`: {kind}its run has `data_digest = {digest[:40]}`, of all files.",
    )
    return (
        f"{who} now tells its run, commit and data, and all three are right. "
        f"{counted(len(datasets), 'dataset')} of the run are also on its page in the UI."
    )


@question("05")
def _own_gain(evidence: Evidence) -> Question:
    """Ask about a promotion of the learner's, if there was one."""
    for version in reversed(evidence.versions_of(evidence.runs_of("05_register_and_promote") + evidence.runs)):
        try:
            accuracy, before = float(version.tags["accuracy"]), float(version.tags["champion_accuracy"])
        except (KeyError, ValueError):  # the first champion had none to beat
            continue
        points = f"{100 * (accuracy - before):.1f} points"
        wrong = {
            f"{100 * accuracy:.1f} points": "That is its accuracy, not the gain.",
            f"{100 * before:.1f} points": "That is the accuracy of the champion before.",
            "0.5 points": "So much is asked for at least. It gained more.",
        }
        if accuracy - before > 0.006 and points not in wrong:
            return Question(
                f"Version {version.version} of your model `{version.name}` was promoted past version "
                f"{version.tags.get('champion_version')}. What did the gate see as its gain?",
                points,
                "The version's tags `accuracy` and `champion_accuracy` have the two numbers.",
                wrong,
            )
    return Question(
        "`promote` is asked twice about the same version, and promotes it at first. What is the second answer?",
        "unchanged: it is the champion already",
        "A job that runs twice does no harm.",
        {
            "promoted: it is still good enough": "It would be compared with itself.",
            "refused: it has no gain over itself": "The gate does not compare a champion with itself.",
            "an error: a version has one decision": "Decisions are tags, and tags can change.",
        },
    )


@question("05")
def _same_address(evidence: Evidence) -> Question:
    return Question(
        "A running server loaded `models:/fashion-classifier@champion`. Then the alias moves. What does it serve?",
        "the version that it loaded, until it loads again",
        "An alias is looked up when the model is loaded.",
        {
            "the new version, as the address is the same": "The address was used once, at the start.",
            "nothing, as the version lost its alias": "A version is there with and without an alias.",
            "the newest version, whatever the alias says": "Only `models:/NAME/latest` asks for the newest.",
        },
    )


@question("05")
def _deleted(evidence: Evidence) -> Question:
    return Question(
        "Somebody deletes the version that the alias `champion` points to. What happens to the alias?",
        "it is deleted with the version, without a word",
        "So look at the aliases of a model before you delete a version.",
        {
            "it moves to the version before, `previous`": "The registry knows no order of aliases.",
            "the registry refuses, as an alias is in use": "It doesn't look, and deletes.",
            "it stays, and points to nothing until moved": "An alias only points to a version that exists.",
        },
    )
