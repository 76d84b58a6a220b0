"""The figures show what they are given."""

import subprocess
import sys

from demo_lib.config import DemoError
from demo_lib.plots import image_grid, loss_curve

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close("all")


def history(run_id, metric, steps, values):
    return pd.DataFrame({"run_id": run_id, "metric": metric, "step": steps, "value": values})


TRAIN = history("a" * 32, "train_loss", [10, 20, 30, 40], [0.9, 0.7, 0.6, 0.5])
VALIDATION = history("a" * 32, "val_loss", [20, 40], [0.8, 0.55])
EMPTY = TRAIN.iloc[:0]


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def points_of(line):
    return list(zip(*map(list, line.get_data()), strict=True))


def test_the_room_does_not_load_mlflow():
    code = "import demo_lib.plots, sys; assert not {'mlflow', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_image_grid_draws_each_image_under_its_title():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 28, 28)
    figure = image_grid(images, [f"image {index}" for index in range(7)])
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [f"image {index}" for index in range(7)]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in drawn] == list(range(7))
    assert len(figure.axes) == 10


def test_loss_curve_shows_both_losses_and_where_epochs_end():
    figure = loss_curve(pd.concat([TRAIN, VALIDATION]), "baseline")
    axis, lines = figure.axes[0], lines_of(figure)
    assert points_of(lines["train_loss"]) == [(10, 0.9), (20, 0.7), (30, 0.6), (40, 0.5)]
    assert points_of(lines["val_loss"]) == [(20, 0.8), (40, 0.55)] and lines["val_loss"].get_marker() == "s"
    vertical = [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [0, 1]]
    assert vertical == [20, 40]
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("baseline", "optimizer step", "cross-entropy")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train_loss", "val_loss", "end of an epoch"]


def test_loss_curve_of_a_run_that_ended_within_its_first_epoch_has_no_val_loss():
    assert set(lines_of(loss_curve(TRAIN, "short"))) == {"train_loss"}


def test_loss_curve_refuses_two_runs_and_nothing():
    for rows in (pd.concat([TRAIN, TRAIN.assign(run_id="b" * 32)]), EMPTY, VALIDATION):
        with pytest.raises(DemoError, match="a loss curve shows the train_loss of one run"):
            loss_curve(rows, "none")
