"""Hunts: every planted fault is found by a query, nothing sound is, and the check counts right."""

import json
import math
import re
import shutil
import sqlite3
from collections import Counter, defaultdict

from demo_lib.__main__ import main
from demo_lib.config import LESSONS, DemoError
from demo_lib.exercises import check, hunt
from demo_lib.exercises.faults import CLUES, KINDS, plan, why_sound
from demo_lib.store import connect

import mlflow
import pytest
from mlflow import MlflowClient

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hunt")]  # the twenty hunts are made once
HUNTS = dict.fromkeys(range(14), 6) | {14: 10, 15: 10, 16: 10, 17: 12, 18: 12, 19: 12}


class Week:
    """One hunt as a learner finds it: its runs, their histories in the order of logging, its registered model."""

    def __init__(self, seed, home):
        self.model = f"hunt-{seed}"
        place = connect("hunt").experiment_id
        self.runs = mlflow.search_runs([place], f"tags.hunt = '{seed}'", output_format="list")
        self.by_id = {run.info.run_id: run for run in self.runs}
        self.done = [run for run in self.runs if run.info.status == "FINISHED" and "epochs" in run.data.params]
        self.histories = defaultdict(list)
        query = (
            "SELECT run_uuid, key, step, CASE is_nan WHEN 1 THEN NULL ELSE value END FROM metrics ORDER BY timestamp"
        )
        with sqlite3.connect(home / "store" / "mlflow.db") as database:  # asked one by one they take 20 s
            for run_id, metric, step, value in database.execute(query):
                if run_id in self.by_id:
                    self.histories[run_id, metric].append((step, math.nan if value is None else value))

    def steps(self, run, metric):
        return [step for step, _ in self.histories[run.info.run_id, metric]]

    def values(self, run, *metrics):
        return [value for metric in metrics for _, value in self.histories[run.info.run_id, metric]]


# One query a kind, which knows nothing of the plan.


def left_running(week):
    return [run for run in week.runs if run.info.status == "RUNNING"]


def steps_start_over(week):
    for run in week.runs:
        steps = week.steps(run, "train_loss")
        if steps != sorted({*steps}):
            yield run


def no_parent(week):
    return [run for run in week.runs if "trial_number" in run.data.tags and "mlflow.parentRunId" not in run.data.tags]


def pruned_failed(week):
    return [run for run in week.runs if (run.data.tags.get("trial_state"), run.info.status) == ("PRUNED", "FAILED")]


def chosen_on_test(week):
    for run in week.done:
        best = max(week.histories[run.info.run_id, "val_accuracy"], key=lambda point: point[1])[0]
        if best != int(run.data.tags["best_step"]):
            yield run


def more_than_one_score(week):
    return [run for run in week.runs if len(week.values(run, "test_accuracy")) > 1]


def percent(week):
    names = "val_accuracy", "test_accuracy", "best_val_accuracy"
    return [run for run in week.runs if any(value > 1 for value in week.values(run, *names))]


def wrong_rate(week):
    for run in week.runs:
        if (rates := {*week.values(run, "learning_rate")}) and rates != {float(run.data.params["learning_rate"])}:
            yield run


def nan_loss(week):
    return [run for run in week.done if any(map(math.isnan, week.values(run, "train_loss", "val_loss")))]


def twice(week):
    seen = set()
    for run in sorted(week.runs, key=lambda run: run.info.start_time):
        histories = [week.histories[run.info.run_id, name] for name in sorted(run.data.metrics)]
        if (everything := str([sorted(run.data.params.items()), histories])) in seen:
            yield run
        seen.add(everything)


def same_params(week):
    """Return what has the parameters of an earlier run: of no sound run that is so."""
    params, found = set(), []
    for run in sorted(week.runs, key=lambda run: run.info.start_time):
        found += [run] if (own := str(sorted(run.data.params.items()))) in params else []
        params.add(own)
    return found


def other_data(week):
    families = defaultdict(list)
    for run in week.runs:
        families[run.data.tags.get("study", run.info.run_id)].append(run)
    for family in families.values():
        usual = Counter(run.data.tags["data_digest"] for run in family).most_common(1)[0][0]
        yield from (run for run in family if run.data.tags["data_digest"] != usual)


def worse_alias(week):
    versions = MlflowClient().search_model_versions(f"name = '{week.model}'")
    scores = {each.run_id: week.by_id[each.run_id].data.metrics["test_accuracy"] for each in versions}
    assert len({*scores.values()}) == 3
    champion = MlflowClient().get_model_version_by_alias(week.model, "champion").run_id
    return [week.by_id[champion]] if scores[champion] < max(scores.values()) else []


def cut_short(week):
    return [run for run in week.done if len(week.values(run, "val_loss")) < int(run.data.params["epochs"])]


QUERIES = [(kind, globals()[kind]) for kind in KINDS]
QUERIES += [("chosen_on_test", more_than_one_score), ("twice", same_params)]


@pytest.fixture(scope="module")
def filled(template, tmp_path_factory):
    """Return the home of a store with all hunts."""
    folder = tmp_path_factory.mktemp("hunts")
    (folder / "store").mkdir()
    shutil.copy(template / "store" / "mlflow.db", folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO_HOME", str(folder))
        for seed, faults in HUNTS.items():
            hunt(seed, faults)
    return folder


@pytest.fixture
def hunts(filled, monkeypatch):
    """Make this process use that store."""
    monkeypatch.setenv("DEMO_HOME", str(filled))
    connect("hunt")
    return filled


def truth(seed):
    return {(run.name, run.fault) for run in plan(seed, HUNTS[seed]) if run.fault}


def accuse(pairs, seed):
    for run in mlflow.search_runs([connect("hunt").experiment_id], f"tags.hunt = '{seed}'", output_format="list"):
        for name, kind in pairs:
            if name == run.info.run_name:
                MlflowClient().set_tag(run.info.run_id, "fault", kind)


def test_the_hunts_of_this_test_have_every_kind():
    planted = Counter(kind for seed in HUNTS for kind in {kind for _, kind in truth(seed)})
    assert planted.keys() == KINDS.keys() == CLUES.keys() and min(planted.values()) >= 5


@pytest.mark.parametrize("seed", HUNTS)
def test_queries_find_each_planted_fault_and_nothing_else(hunts, seed):
    week = Week(seed, hunts)
    assert 40 <= len(week.runs) <= 45 and len({kind for _, kind in truth(seed)}) == HUNTS[seed]
    for kind, query in QUERIES:
        found = {run.info.run_name for run in query(week)}
        assert found == {name for name, guilty in truth(seed) if guilty == kind}, (kind, query.__name__)
    given_away = {*KINDS, "guilty", "fault", "sound", "planted"}
    for run in week.runs:
        stored = str([run.info.run_name, run.data.params, run.data.tags, [*run.data.metrics]])
        assert not given_away & {*re.findall(r"\w+", stored)}


@pytest.mark.parametrize("seed", [0, 17])
def test_the_check_counts_what_is_found(hunts, seed):
    number = "03.3" if HUNTS[seed] < 10 else "09.1"
    pairs = sorted(truth(seed))
    accuse(pairs[:-1], seed)
    reply, missed = check(number), pairs[-1][1]
    assert reply.answer == "not yet" and f"{HUNTS[seed] - 1} of {HUNTS[seed]} faults are found" in reply.text
    assert f"{len(pairs) - 1} of {len(pairs)} guilty runs. Still hidden: " in reply.text
    assert CLUES[missed] in reply.text or f"of `{missed}` you have 1 of 2 runs" in reply.text
    accuse(pairs[-1:], seed)
    assert check(number).answer == "passed"
    sound = next(run.name for run in plan(seed, HUNTS[seed]) if not run.fault)
    accuse([(sound, "left_running")], seed)
    reply = check(number)
    assert reply.answer == "not yet" and f"No fault: run `{sound}`" in reply.text and "it is FINISHED" in reply.text
    accuse([(sound, " ")], seed)
    assert check(number).answer == "passed"


def test_no_hunt_has_equal_runs_or_best_epochs_by_chance():
    for seed in range(300):
        for faults in (6, 12):
            planned = plan.__wrapped__(seed, faults)
            params = Counter(str(run.params) for run in planned)
            assert len(planned) - len(params) == sum(run.fault == "twice" for run in planned)
            for run in planned:
                accuracies = [*run.values("val_accuracy").values()]
                assert accuracies.count(max(accuracies, default=0)) < 2
            assert all(run.start >= 2 * 24 * 60 for run in planned if run.status == "RUNNING")


def test_a_sound_run_has_a_reason_for_every_kind():
    for seed, faults in HUNTS.items():
        planned = plan(seed, faults)
        for run in planned:
            reasons = {kind: why_sound(run, kind, planned) for kind in KINDS if not run.fault}
            assert all("None" not in reason and len(reason) < 90 for reason in reasons.values()), reasons


def test_a_hunt_that_is_there_stays_and_another_number_of_faults_is_refused(hunts):
    accuse([(plan(1, 6)[5].name, "percent")], 1)
    before = everything(1)
    assert not hunt(1).made and not hunt("1", "6").made
    assert everything(1) == before
    with pytest.raises(DemoError, match=r"a hunt with seed 1 .* is there: choose another seed, or faults=6\."):
        hunt(1, 7)


@pytest.mark.parametrize("bad", [(-1,), ("x",), (1.5,), (True,), (None,), ("9" * 5000,), (3, 5), (3, 13), (3, "")])
def test_a_seed_that_is_none_is_one_sentence(hunts, bad):
    with pytest.raises(DemoError, match=r"^(seed|faults) = .* is not allowed: give a whole number from \d+ to \d+\.$"):
        hunt(*bad)


def everything(seed):
    """Return all that the hunt's runs hold, but for the times and the ids."""
    client, found = MlflowClient(), {}
    place = connect("hunt").experiment_id
    runs = mlflow.search_runs([place], f"tags.hunt = '{seed}'", output_format="list")
    names = {run.info.run_id: run.info.run_name for run in runs}
    for run in runs:
        info, tags = run.info, {**run.data.tags, "hunt_made": "some time"}
        tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId"))
        points = {
            name: [
                (point.step, str(point.value), point.timestamp - info.start_time)
                for point in client.get_metric_history(info.run_id, name)
            ]
            for name in sorted(run.data.metrics)
        }
        minutes = info.end_time and info.end_time - info.start_time
        found[info.run_name] = info.status, minutes, run.data.params, tags, points
    assert len(found) == len(runs)
    model = client.get_registered_model(f"hunt-{seed}")
    versions = client.search_model_versions(f"name = 'hunt-{seed}'")
    return found, {each.version: names[each.run_id] for each in versions}, dict(model.aliases)


@pytest.mark.parametrize(
    ("call", "times"),
    [
        ("create_run", 2),
        ("log_batch", 1),
        ("log_batch", 4),  # of the one that is left running
        ("log_batch", 20),
        ("set_terminated", 30),
        ("create_registered_model", 1),
        ("create_model_version", 2),
        ("set_registered_model_alias", 1),
    ],
)
def test_a_hunt_that_was_cut_off_is_completed(home, hunts, monkeypatch, call, times):
    seed = next(seed for seed in range(2, 14) if "left_running" in {kind for _, kind in truth(seed)})
    whole = everything(seed)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DEMO_HOME", str(home))
    works, calls = getattr(MlflowClient, call), []

    def stops(*given, **named):
        calls.append(call)
        if len(calls) == times:
            raise KeyboardInterrupt
        return works(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, stops)
        with pytest.raises(KeyboardInterrupt):
            hunt(seed)
    assert hunt(seed).made and not hunt(seed).made
    assert everything(seed) == whole


def test_a_run_that_was_deleted_is_missed_and_made_again(home):
    hunt(30)
    pairs = {(run.name, run.fault) for run in plan(30, 6) if run.fault}
    accuse(pairs, 30)
    run = next(run for run in mlflow.search_runs(output_format="list") if "fault" not in run.data.tags)
    MlflowClient().delete_run(run.info.run_id)
    reply = check("03.3")
    assert reply.answer == "not yet"
    assert f"The hunt with seed 30 lacks 1 run, as `{run.info.run_name}`: restore" in reply.text
    assert hunt(30).made
    assert check("03.3").answer == "passed"


def test_odd_tags_are_no_reason_to_fail(home):
    hunt(30)
    runs = mlflow.search_runs(output_format="list")
    client = MlflowClient()
    client.set_tag(runs[0].info.run_id, "fault", "x" * 300)
    client.set_tag(runs[1].info.run_id, "hunt_faults", "many")
    assert "lacks 1 run" in check("03.3").text
    client.set_tag(runs[1].info.run_id, "hunt_faults", "6")
    client.set_tag(runs[2].info.run_id, "fault", " Percent")
    mine = client.create_run(runs[0].info.experiment_id, run_name="mine")
    for tag, value in {"hunt": "30", "hunt_faults": "6", "fault": "twice"}.items():
        client.set_tag(mine.info.run_id, tag, value)
    reply = check("03.3")
    assert (
        "which is no kind: do you mean `percent`? 1 more like this." in reply.text
        and "`mine`" in reply.text
        and len(reply.text) < 500
    )
    assert check("09.1").answer == "not attempted"


def test_the_hunts_of_other_sizes_and_other_tags_are_told_of(home):
    assert "has no hunt of fewer than 10 kinds of faults" in check("03.3").text
    assert "has no hunt of 10 or more kinds of faults" in check("09.1").text
    hunt(30)
    run = mlflow.search_runs(output_format="list")[0]
    MlflowClient().set_tag(run.info.run_id, "Fault", "percent")
    said = check("03.3").text
    assert "No run of your hunt with seed 30 has the tag `fault`" in said and f"But run `{run.info.run_name}`" in said
    assert "has no hunt of 10 or more" in check("09.1").text


def test_the_command_line_makes_a_hunt_and_says_where(home, capsys):
    assert main(["hunt", "--seed", "31"]) == 0
    said = capsys.readouterr()
    assert "The hunt with seed 31 is made: 4" in said.out and "#/experiments/" in said.out and not said.err
    assert main(["hunt", "--seed", "31"]) == 0
    assert "The hunt with seed 31 was there already" in capsys.readouterr().out
    for arguments in (["--seed", "-1"], ["--seed", "1.5"], ["--seed", "31", "--faults", "99"], ["--seed", "31x"]):
        assert main(["hunt", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_notebooks_say_what_each_kind_is():
    for number in ("03", "09"):
        notebook = json.loads((LESSONS / "solutions" / f"{number}_find_what_is_wrong.ipynb").read_text("utf-8"))
        text = "".join("".join(cell["source"]) + "\n" for cell in notebook["cells"])
        assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.M)) == KINDS


@pytest.mark.parametrize("number", ["03", "09"])
def test_the_solutions_find_the_faults_of_every_hunt(hunts, number):
    """The cells of the solution, for hunts of other seeds than the notebook's."""
    path = LESSONS / "solutions" / f"{number}_find_what_is_wrong.ipynb"
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    code = "\n".join(source for source in sources if not re.match(r"(check|quiz)\(", source))
    code = re.sub(r"^hunt\(.*\)$", "", code, flags=re.M)
    for seed in (2, 3, 15, 18, 19):
        names = {"__name__": "solution"}
        exec(re.sub(r"^SEED = \d+", f"SEED = {seed}", code, flags=re.M), names)
        place = [connect("hunt").experiment_id]
        runs = mlflow.search_runs(place, f"tags.hunt = '{seed}'", output_format="list")
        tagged = {(run.info.run_name, run.data.tags["fault"]) for run in runs if "fault" in run.data.tags}
        assert tagged == truth(seed)
        for run in runs:
            if "fault" in run.data.tags:
                MlflowClient().delete_tag(run.info.run_id, "fault")
