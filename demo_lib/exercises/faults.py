"""The runs of a hunt as its seed draws them, sound ones and guilty ones: nothing in the store says which is which."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random

KINDS = {
    "left_running": "The run is still RUNNING, though it began days ago: its process is gone.",
    "steps_start_over": "The steps of `train_loss` start over in each epoch, where they should only rise.",
    "no_parent": "The trial belongs to a study (tag `study`), but is not nested in the study's run.",
    "pruned_failed": "The trial was pruned (tag `trial_state`), but its run is FAILED and not KILLED.",
    "chosen_on_test": "The best epoch (tag `best_step`) was chosen by `test_accuracy` and not by `val_accuracy`.",
    "percent": "An accuracy of the run is in percent, where it should be a share from 0 to 1.",
    "wrong_rate": "The parameter `learning_rate` is not the learning rate in the run's history.",
    "nan_loss": "A loss became NaN (not a number), and the run is FINISHED all the same.",
    "twice": "The run repeats an earlier one: same parameters, same seed, same histories. The later one is guilty.",
    "other_data": "The trial had other data (tag `data_digest`) than its study.",
    "worse_alias": "The alias `champion` is on a version with a lower `test_accuracy` than another. Its run is guilty.",
    "cut_short": "The run is FINISHED, but has fewer epochs than its parameter `epochs` says.",
}
CLUES = {
    "left_running": "a status that can't be true any more",
    "steps_start_over": "the steps of a curve",
    "no_parent": "families of runs",
    "pruned_failed": "how a trial ended",
    "chosen_on_test": "how the best epoch was chosen",
    "percent": "the unit of a metric",
    "wrong_rate": "a parameter that its run did not use",
    "nan_loss": "values that are no numbers",
    "twice": "runs that are equal",
    "other_data": "trials that should not be compared",
    "worse_alias": "the registered model",
    "cut_short": "how long a run was trained",
}

DAY = 24 * 60  # minutes
STEPS = {64: 30, 128: 15, 256: 9}  # optimizer steps in an epoch, by batch size
RATES = 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03
ADJECTIVES = "amber brave calm dusty early fuzzy green happy icy jolly keen lucky misty noble proud quiet rusty shy"
NOUNS = "otter heron maple cedar comet pebble falcon badger willow harbor lantern meadow raven spruce tiger walnut"
WIDTHS, EPOCHS = (8, 16, 32), (4, 5, 6, 8)
SEEDS = range(1, 6)  # with which two trainings never differ in the rate only; trials have 0
STUDIES = "first search", "second search", "last search"
MODEL_RUNS = 3  # as many versions has the registered model


@dataclass
class Planned:
    """One run of a hunt; a point is metric, step, value and the share of the run's time that had passed."""

    name: str
    start: int  # minutes before the hunt was made
    minutes: float
    params: dict[str, object]
    tags: dict[str, str]
    points: list[tuple[str, int, float, float]] = field(default_factory=list)
    status: str = "FINISHED"
    parent: str | None = None
    version: int | None = None
    champion: bool = False
    fault: str | None = None

    def values(self, metric: str) -> dict[int, float]:
        """Return the metric's values by step."""
        return {step: value for name, step, value, _ in self.points if name == metric}

    def replace(self, change: Callable[[str, int, float], tuple[int, float]]) -> None:
        """Give each point the step and the value that the function makes of its metric, step and value."""
        self.points = [(name, *change(name, step, value), when) for name, step, value, when in self.points]


@cache
def plan(seed: int, faults: int) -> list[Planned]:
    """Return the runs of the hunt in the order in which they are made: parents, those left running, the others."""
    draw = Random(f"hunt {seed} {faults}")
    kinds = draw.sample([*KINDS], faults)
    names = draw.sample([f"{first}-{second}" for first in ADJECTIVES.split() for second in NOUNS.split()], 21)
    digests = [f"{draw.getrandbits(64):016x}" for _ in range(2)]
    singles = _singles(draw, names[:20], digests[0])
    studies = [_study(draw, number, digests[number == 2]) for number in range(3)]
    _plant(draw, kinds, singles, studies, names[20], digests)
    for parent, *trials in studies:
        _conclude_study(parent, trials)
    parents = [parent for parent, *_ in studies]
    others = sorted(singles + [trial for _, *trials in studies for trial in trials], key=lambda run: -run.start)
    return parents + sorted(others, key=lambda run: run.status != "RUNNING")


def _singles(draw: Random, names: list[str], digest: str) -> list[Planned]:
    """Return twenty trainings. The first two differ in their seed only, the next three did not end well and say so."""
    others = [
        (batch, width, epochs, seed) for batch in STEPS for width in WIDTHS for epochs in EPOCHS for seed in SEEDS
    ]
    found, slots = [], draw.sample(range(20), 20)
    for number, (name, slot, (batch, width, epochs, seed)) in enumerate(
        zip(names, slots, draw.sample(others, 20), strict=True)
    ):
        params = {"learning_rate": draw.choice(RATES), "batch_size": batch, "channels": width, "epochs": epochs}
        if number == 1:
            params, seed = found[0].params, 6
        start = 7 * DAY - slot * 500 - draw.randrange(300)
        found.append(_training(draw, name, start, params | {"seed": seed}, {"data_digest": digest}))
    ends = [
        ("KILLED", "KeyboardInterrupt"),
        ("FAILED", "ValueError: the loss is not a number"),
        ("FAILED", "OSError: No space left on device"),
    ]
    for run, (status, error) in zip(found[2:5], ends, strict=True):
        run.status, run.tags["error"] = status, error
        _cut(run, draw.randrange(2, run.params["epochs"]))
    _spoil(found[3], 2)
    for run in found:
        _conclude(draw, run)
    return found


def _study(draw: Random, number: int, digest: str) -> list[Planned]:
    """Return the study's parent and six trials; the last study has a trial that failed honestly."""
    name, start = STUDIES[number], (6 - number) * DAY - draw.randrange(DAY // 2)
    tags = {"study": name, "data_digest": digest}
    states = ["COMPLETE"] * 4 + ["PRUNED"] * 2 if number < 2 else ["COMPLETE"] * 3 + ["PRUNED"] * 2 + ["FAIL"]
    draw.shuffle(states)
    family = [Planned(name, start, 62, {"trials": 6, "sampler": "random", "sampler_seed": number}, dict(tags))]
    for trial, state in enumerate(states):
        rate = round(10 ** draw.uniform(-3, -1.5), 8)  # so many digits that no two trials are equal
        chosen = {"learning_rate": rate, "batch_size": draw.choice([*STEPS]), "channels": draw.choice(WIDTHS)}
        own = tags | {"trial_number": str(trial), "trial_state": state}
        run = _training(draw, f"{name} {trial}", start - 1 - 10 * trial, chosen | {"epochs": 5, "seed": 0}, own)
        run.parent = name
        if state != "COMPLETE":
            run.status = "KILLED" if state == "PRUNED" else "FAILED"
            _cut(run, draw.randrange(1, 3))
        if state == "FAIL":
            run.tags["error"] = "RuntimeError: not enough memory"
        _conclude(draw, run)
        family.append(run)
    return family


def _training(draw: Random, name: str, start: int, params: dict, tags: dict[str, str]) -> Planned:
    """Return a run with the curves of a whole training."""
    run = Planned(name, start, draw.uniform(6, 9), params, tags)
    rate, epochs, steps = params["learning_rate"], params["epochs"], STEPS[params["batch_size"]]
    peak = 0.9 - 0.03 * math.log10(rate / 0.006) ** 2 - 0.08 / params["channels"]
    used: set[float] = set()
    for epoch in range(1, epochs + 1):
        for third in (1, 2, 3):
            step, passed = (epoch - 1) * steps + third * steps // 3, epoch - 1 + third / 3
            loss = 0.35 + 1.8 * math.exp(-1.2 * passed) + draw.uniform(-0.02, 0.02)
            run.points.append(("train_loss", step, round(loss, 5), passed / epochs * 0.95))
        accuracy = round(peak - 0.3 * math.exp(-0.9 * epoch) + draw.uniform(-0.008, 0.008), 4)
        while accuracy in used:  # one epoch is the best
            accuracy = round(accuracy - 0.0001, 4)
        used.add(accuracy)
        loss = round(2.7 * (1 - accuracy) + draw.uniform(-0.01, 0.01), 5)
        for metric, value in {"val_loss": loss, "val_accuracy": accuracy, "learning_rate": rate}.items():
            run.points.append((metric, epoch * steps, value, epoch / epochs * 0.95))
    return run


def _cut(run: Planned, epochs: int) -> None:
    """Leave the run's first epochs."""
    share = epochs / run.params["epochs"]
    last = epochs * STEPS[run.params["batch_size"]]
    run.points = [(*point[:3], point[3] / share) for point in run.points if point[1] <= last]
    run.minutes *= share


def _spoil(run: Planned, epoch: int) -> None:
    """Make the losses NaN from this epoch on: such a network says the same class always."""
    steps = STEPS[run.params["batch_size"]]

    lost = {"train_loss": math.nan, "val_loss": math.nan, "val_accuracy": 0.1}
    run.replace(
        lambda name, step, value: (step, lost.get(name, value) if step > (epoch - 1) * steps else value),
    )


def _conclude(draw: Random, run: Planned) -> None:
    """Name the best epoch of a run that is done, and let it be tested if it is no trial."""
    run.points = [point for point in run.points if point[0] != "test_accuracy"]
    run.tags.pop("best_step", None)
    if run.status != "FINISHED":
        return
    accuracy = run.values("val_accuracy")
    best = max(accuracy, key=accuracy.__getitem__)
    run.tags["best_step"] = str(best)
    if run.parent is None:
        run.points.append(("test_accuracy", best, round(accuracy[best] - draw.uniform(0.001, 0.012), 4), 0.99))


def _conclude_study(parent: Planned, trials: list[Planned]) -> None:
    """Name the study's winner."""
    done = [trial for trial in trials if trial.tags.get("trial_state") == "COMPLETE"]
    best = max(done, key=lambda trial: max(trial.values("val_accuracy").values()))
    parent.tags["best_trial"] = best.tags["trial_number"]
    parent.points = [("best_val_accuracy", 0, max(best.values("val_accuracy").values()), 0.99)]


def _plant(
    draw: Random, kinds: list[str], singles: list[Planned], studies: list[list[Planned]], name: str, digests: list[str]
) -> None:
    """Make runs guilty, each of one kind, and register three; those that a kind can't do without are taken first."""
    free = singles[5:]
    draw.shuffle(free)
    registered = [free.pop() for _ in range(MODEL_RUNS)]
    _register(draw, registered, "worse_alias" in kinds)
    trials = [trial for _, *others in studies for trial in others]
    complete = [trial for trial in trials if trial.tags["trial_state"] == "COMPLETE"]
    if "no_parent" in kinds:
        family = draw.choice(STUDIES)
        for run in draw.sample([trial for trial in complete if trial.parent == family], 2):
            run.fault, run.parent = "no_parent", None
            complete.remove(run)
    if "pruned_failed" in kinds:
        pruned = [trial for trial in trials if trial.tags["trial_state"] == "PRUNED"]
        for run in draw.sample(pruned, draw.choice([1, 2])):
            run.fault, run.status = "pruned_failed", "FAILED"
    if "other_data" in kinds:
        run = complete.pop(draw.randrange(len(complete)))
        run.fault, run.tags["data_digest"] = "other_data", digests[run.tags["data_digest"] == digests[0]]
    if "twice" in kinds:
        first = free.pop()
        again = copy.deepcopy(first)
        again.name, again.start, again.fault = name, first.start - draw.randrange(30, 90), "twice"
        singles.append(again)
    for kind, (spoil, often) in ON_SINGLES.items():
        if kind in kinds:
            for _ in range(draw.choice(often)):
                run = free.pop()
                run.fault = kind
                spoil(draw, run)
    for kind, (spoil, often) in ON_ANY.items():
        if kind in kinds:
            for _ in range(draw.choice(often)):
                here = draw.choice([free, free, complete])
                run = here.pop(draw.randrange(len(here)))
                run.fault = kind
                spoil(draw, run)


def _register(draw: Random, runs: list[Planned], worse: bool) -> None:
    """Give the runs versions of one model, clearly not equally good, and one of them the alias."""
    scores = [0.881 + draw.uniform(0, 0.004) - 0.012 * number for number in range(len(runs))]
    chosen = draw.randrange(1, len(runs)) if worse else 0
    for number, (run, score) in enumerate(zip(runs, scores, strict=True)):

        def change(metric: str, step: int, value: float, score: float = score) -> tuple[int, float]:
            return step, round(score, 4) if metric == "test_accuracy" else value

        run.replace(change)
        run.champion = number == chosen
        run.fault = "worse_alias" if worse and run.champion else None
    for version, run in enumerate(draw.sample(runs, len(runs)), 1):
        run.version = version


def _left_running(draw: Random, run: Planned) -> None:
    run.status = "RUNNING"
    if run.start < 2 * DAY:
        run.start = 2 * DAY + draw.randrange(3 * DAY)
    _cut(run, draw.randrange(1, run.params["epochs"]))
    _conclude(draw, run)
    if "trial_state" in run.tags:
        run.tags["trial_state"] = "RUNNING"


def _steps_start_over(draw: Random, run: Planned) -> None:
    steps = STEPS[run.params["batch_size"]]
    run.replace(lambda name, step, value: ((step - 1) % steps + 1 if name == "train_loss" else step, value))


def _chosen_on_test(draw: Random, run: Planned) -> None:
    accuracy = run.values("val_accuracy")
    tested = {step: round(value - draw.uniform(0.001, 0.012), 4) for step, value in accuracy.items()}
    best = max(accuracy, key=accuracy.__getitem__)
    chosen = draw.choice([*(step for step in [*accuracy][1:] if step != best)])
    tested[chosen] = round(max(tested.values()) + draw.uniform(0.001, 0.004), 4)
    last = max(accuracy)
    run.points = [point for point in run.points if point[0] != "test_accuracy"]
    run.points += [("test_accuracy", step, value, step / last * 0.96) for step, value in tested.items()]
    run.tags["best_step"] = str(chosen)


def _percent(draw: Random, run: Planned) -> None:
    spoiled = draw.choice([("test_accuracy",), ("val_accuracy", "test_accuracy")])
    run.replace(lambda name, step, value: (step, round(100 * value, 2) if name in spoiled else value))


def _wrong_rate(draw: Random, run: Planned) -> None:
    rate = run.params["learning_rate"]
    others = [each for each in RATES if not rate / 1.5 < each < 1.5 * rate]
    run.params["learning_rate"] = round(rate * draw.uniform(2, 5), 8) if run.parent else draw.choice(others)


def _nan_loss(draw: Random, run: Planned) -> None:
    _spoil(run, draw.randrange(3, run.params["epochs"] + 1))
    _conclude(draw, run)


def _cut_short(draw: Random, run: Planned) -> None:
    _cut(run, draw.randrange(2, run.params["epochs"]))
    _conclude(draw, run)


# How a run is made guilty, and how many runs of a hunt are.
ON_SINGLES = {"chosen_on_test": (_chosen_on_test, [1]), "percent": (_percent, [1, 2])}
ON_ANY = {
    "left_running": (_left_running, [1]),
    "steps_start_over": (_steps_start_over, [1]),
    "wrong_rate": (_wrong_rate, [1, 2]),
    "nan_loss": (_nan_loss, [1]),
    "cut_short": (_cut_short, [1, 2]),
}


def why_sound(run: Planned, kind: str, runs: list[Planned]) -> str:
    """Say why the run is not guilty of the kind, as the end of a sentence that goes on after `but`."""
    trained, trial = len(run.values("val_loss")), "trial_number" in run.tags
    if "study" in run.tags and not trial and kind != "left_running":
        return "it is the run of a study, which trains nothing itself"
    if kind in ("no_parent", "other_data") and not trial:
        return "it is a trial of no study"
    if kind == "twice":
        return _why_not_twice(run, runs)
    if kind == "cut_short" and trained < run.params["epochs"]:
        return f"it is {run.status}, so it does not claim all epochs"
    if kind == "nan_loss" and any(map(math.isnan, run.values("val_loss").values())):
        return f"it is {run.status}, so its status tells of the NaN"
    if kind == "worse_alias" and run.champion:
        return "its version has the highest `test_accuracy` of all"
    accuracy = max([*run.values("test_accuracy").values(), *run.values("val_accuracy").values()], default=0)
    return {
        "left_running": f"it is {run.status}",
        "steps_start_over": "the steps of its `train_loss` only rise",
        "no_parent": f"it is nested in `{run.parent}`",
        "pruned_failed": f"it is {run.status}, and its `trial_state` {run.tags.get('trial_state', 'is not there')}",
        "chosen_on_test": "its `test_accuracy` does not have a value each epoch to choose by",
        "percent": f"its highest accuracy is {accuracy:.3f}",
        "wrong_rate": "its parameter is the rate in its history",
        "nan_loss": "no loss of it is NaN",
        "other_data": "its `data_digest` is that of its study",
        "worse_alias": "it has no version with the alias `champion`",
        "cut_short": f"it has all of its {trained} epochs",
    }[kind]


def _why_not_twice(run: Planned, runs: list[Planned]) -> str:
    if any(each.fault == "twice" and each.points == run.points for each in runs):
        return "it is the earlier of the two"
    like = [each for each in runs if each is not run and each.params | {"seed": 0} == run.params | {"seed": 0}]
    return f"`{like[0].name}` has another seed" if like else "no earlier run has its histories"
