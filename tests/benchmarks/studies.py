"""Measures of studies: what pruning saves, and what workers gain. Their trials are drawn before, the same for all."""

import logging
import random
import uuid
from collections.abc import Callable, Generator, Iterator
from functools import partial

from demo_lib import tuning
from demo_lib.config import TuneConfig, settings, sqlite_uri
from demo_lib.data import FashionData
from demo_lib.ops import workers
from demo_lib.study import open_study

import optuna
import torch
from distributed import LocalCluster
from mlflow.entities import Run

from tests.benchmarks.rows import Row, in_turns, new_home, seconds

PRUNED = TuneConfig(study="pruning", trials=12, train_images=2_000, epochs=5)
PARALLEL = TuneConfig(study="workers", trials=8, train_images=6_000, epochs=2, prune=False)
ROUNDS = 1  # of the long measures


def measure_pruning() -> Iterator[Row]:
    """The same trials with and without pruning; the accuracy is the best trial's, on the validation split."""
    draw = random.Random(0)
    trials = [
        {"learning_rate": 10 ** draw.uniform(-3, -1), "batch_size": draw.choice([64, 128, 256])}
        | {"channels": draw.choice([4, 8, 12, 16]), "dropout": draw.uniform(0, 0.5)}
        for _ in range(PRUNED.trials)
    ]

    def study(prune: bool) -> tuple[float, float]:
        config, found = PRUNED.model_copy(update={"prune": prune}), []
        address = prepared(config, trials)
        taken = seconds(lambda: found.append(tuning.tune(config, storage=address)))
        return taken, 100 * found[0].data.metrics["best_val_accuracy"]

    with new_home():
        results = in_turns(lambda: study(False), lambda: study(True), repeats=ROUNDS)
    times, accuracies = zip(*(zip(*pairs, strict=True) for pairs in results), strict=True)
    yield Row("pruning", *times)
    # What pruning loses: the best trial, where that learns late. Within the standard error they are as good.
    yield Row("pruning accuracy", *reversed(accuracies))


def measure_workers() -> Iterator[Row]:
    """The same study by one process, by two threads, by several processes here, and by two of a Dask cluster."""
    logging.getLogger("distributed").setLevel(logging.ERROR)
    trials = [
        {"learning_rate": 0.01, "batch_size": 128, "channels": 4 * (number % 4 + 1), "dropout": 0.1}
        for number in range(PARALLEL.trials)
    ]

    def study(tune: Callable[..., Run], count: int, **options: object) -> float:
        config = PARALLEL.model_copy(update={"workers": count})
        return seconds(partial(tune, config, storage=prepared(config, trials), **options))

    with (
        new_home(),
        LocalCluster(2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
    ):
        kinds = {
            "2 threads": lambda: study(tuning.tune, 1, work=in_threads),
            "2 workers": lambda: study(workers.tune, 2),
            "4 workers": lambda: study(workers.tune, 4),
            "Dask": lambda: study(workers.tune, 2, dask=cluster.scheduler_address),
        }
        one, *others = in_turns(lambda: study(workers.tune, 1), *kinds.values(), repeats=ROUNDS)
    for name, times in zip(kinds, others, strict=True):
        yield Row(name, one, times)


def prepared(config: TuneConfig, trials: list[dict]) -> str:
    """Put the trials into a new study's queue, and return the address of its storage."""
    address = sqlite_uri(settings().home / f"optuna-{uuid.uuid4().hex}.db")
    study = open_study(config, address)
    study.set_user_attr("config", config.model_dump())  # that it was made here
    for trial in trials:
        study.enqueue_trial(trial)
    return address


def in_threads(study: optuna.Study, config: TuneConfig, data: FashionData) -> Generator[None]:
    """Do the study's trials in two threads, as Optuna's `n_jobs=2` does, each with one thread of PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    parent = study.user_attrs["parent_run_id"]
    study.optimize(
        lambda trial: tuning.run_trial(trial, config, data, parent), n_trials=config.trials, n_jobs=2, catch=Exception
    )
    torch.set_num_threads(before)
    yield
