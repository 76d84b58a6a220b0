"""Lesson 01 as one call."""

import os
import signal
import time
from collections.abc import Mapping

from demo_lib.config import TrainConfig
from demo_lib.data import batches, load_data
from demo_lib.model import build_model
from demo_lib.parallel import joined
from demo_lib.store import connect
from demo_lib.tracking import log_config, log_datasets, log_model, provenance, signals, truthful_status
from demo_lib.training import evaluate, fit, pick_device

import mlflow
from mlflow.entities import Run
from tqdm import tqdm


def train(config: TrainConfig, experiment: str = "train", tags: Mapping[str, str] | None = None) -> Run:
    """Do in one tracked run of the experiment what lesson 01 does, without its figures, and return the run.

    Logs parameters, metrics, both datasets, the layers, and the best and the last model; the best one, chosen on the
    validation split, is scored once on the test split. `tags` are added to those of `provenance`.
    """
    connect(experiment)
    data = load_data(config)
    print(data)
    model = build_model(config)
    with mlflow.start_run(tags=provenance(data, config) | dict(tags or {})) as run, truthful_status():
        log_config(config)
        mlflow.log_text(str(model), "model_summary.txt")
        log_datasets(data)
        best, started = None, time.perf_counter()
        with tqdm(total=config.epochs, unit="epoch", disable=None) as bar:
            for record in fit(model, data, config):
                mlflow.log_metrics(record.metrics, step=record.step)
                best = record if record.weights else best
                bar.update("val_loss" in record.metrics)
        mlflow.log_metric("fit_seconds", time.perf_counter() - started, step=record.step)
        example = next(batches(data.test, 2))[0]
        log_model(model, "last_model", example, step=record.step)
        model.load_state_dict(best.weights)
        log_model(model, "best_model", example, step=best.step)
        test = {f"test_{name}": value for name, value in evaluate(model, data.test).items()}
        mlflow.log_metrics(test, step=best.step)
    return mlflow.get_run(run.info.run_id)


def train_together(config: TrainConfig) -> Run | None:
    """Do as `train` with the processes that torchrun started, if it did; the first one tracks, and alone gets the run.

    One of the others that dies ends the run FAILED. What `joined` refuses is a DemoError.
    """
    with joined(pick_device(config), config.batch_size) as rank:
        if rank == 0:
            return train(config)
        # Beside the first process, which closes the run after Ctrl-C; without it, this one ends.
        beside = os.environ["GROUP_RANK"] == "0"
        with signals({signal.SIGINT: signal.SIG_IGN} if beside else {}):
            for _ in fit(build_model(config), load_data(config), config):
                pass
    return None
