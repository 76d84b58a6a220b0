"""Matplotlib figures for the lessons; they draw what they are given and ask no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor

# Told apart by colour-blind people and in print: colours, and styles and markers that repeat only after 36 lines.
COLORS = color_sequences["petroff8" if "petroff8" in color_sequences else "petroff10"]
STYLES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "p"]


def image_grid(images: Tensor, titles: Sequence[str], columns: int = 5) -> Figure:
    """Draw grey images of shape (N, 1, 28, 28) in rows of `columns`, each under its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.squeeze(0).numpy(), cmap="gray_r")
        axis.set_title(title, fontsize=9)
    return figure


def loss_curve(history: pd.DataFrame, title: str) -> Figure:
    """Draw one run's `train_loss` by optimizer step, and its `val_loss` with a thin line at each epoch's end.

    `history` has the columns run_id, metric, step, value. Without a `train_loss`, or with more than one run, it is a
    ValueError.
    """
    train = _metric(history, "train_loss")
    if train["run_id"].nunique() > 1:
        raise ValueError("a loss curve shows one run: select the rows of one run_id.")
    validation = history[history["metric"] == "val_loss"]
    figure, axis = _axes(title, "cross-entropy")
    axis.plot(train["step"], train["value"], color=COLORS[0], label="train_loss")
    if len(validation):
        axis.plot(validation["step"], validation["value"], "s--", color=COLORS[1], label="val_loss")
    for number, end in enumerate(validation["step"]):
        axis.axvline(end, color="0.6", linewidth=1, zorder=0, label=None if number else "end of an epoch")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def compare_curves(history: pd.DataFrame, labels: Mapping[str, str], metric: str) -> Figure:
    """Draw the metric by optimizer step, one line a run, named by `labels` (run_id to text) or else by its run_id.

    `history` has the columns run_id, metric, step, value. Without a point of the metric it is a ValueError.
    """
    points = _metric(history, metric)
    figure, axis = _axes(metric, metric)
    for number, (run_id, line) in enumerate(points.groupby("run_id", sort=False)):
        axis.plot(
            line["step"],
            line["value"],
            color=COLORS[number % len(COLORS)],
            linestyle=STYLES[number % len(STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            markevery=max(1, len(line) // 10),
            label=labels.get(run_id, run_id[:8]),
        )
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _axes(title: str, quantity: str) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.set(title=title, xlabel="optimizer step", ylabel=quantity)
    return figure, axis


def _metric(history: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of the metric."""
    rows = history[history["metric"] == metric] if len(history) else history
    if rows.empty:
        raise ValueError(f"there is no point of {metric} to draw: check the run ids and the metric's name.")
    return rows
