"""Matplotlib figures for the lessons; they draw what they are given and ask no store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

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


def loss_curve(history: pd.DataFrame, epochs: pd.DataFrame | Sequence[int], title: str) -> Figure:
    """Draw one run's `train_loss` by optimizer step, a thin line at each epoch's end and the `val_loss` there.

    `history` has the columns run_id, metric, step, value. `epochs` are the steps where epochs end, or a frame in the
    form of `history` with the `val_loss` at these steps.

    Raises:
        ValueError: `history` has no `train_loss`, or holds more than one run.
    """
    train = _metric(history, "train_loss")
    if train["run_id"].nunique() > 1:
        raise ValueError("a loss curve shows one run: select the rows of one run_id.")
    if isinstance(epochs, pd.DataFrame):
        validation = epochs[epochs["metric"] == "val_loss"]
        ends = validation["step"]
    else:
        ends = list(epochs)
        validation = history[(history["metric"] == "val_loss") & history["step"].isin(ends)]
    figure, axis = _axes(title)
    axis.plot(train["step"], train["value"], color=COLORS[0], label="train_loss")
    if len(validation):
        axis.plot(validation["step"], validation["value"], "s--", color=COLORS[1], label="val_loss")
    for number, end in enumerate(ends):
        axis.axvline(end, color="0.6", linewidth=1, zorder=0, label=None if number else "end of an epoch")
    _label(axis, "cross-entropy")
    return figure


def compare_curves(history: pd.DataFrame, labels: Mapping[str, str], metric: str) -> Figure:
    """Draw the metric by optimizer step, one line a run, named by `labels` (run_id to text) or else by its run_id.

    `history` has the columns run_id, metric, step, value.

    Raises:
        ValueError: `history` has no points of the metric.
    """
    points = _metric(history, metric)
    figure, axis = _axes(metric)
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
    _label(axis, metric)
    return figure


def parallel_coordinates(runs: pd.DataFrame, params: list[str], metric: str, log: Collection[str] = ()) -> Figure:
    """Draw one line a run across an axis for each parameter, the darker the higher the metric.

    The lower half of the runs is all in the lightest colour: one very bad run would make the others look alike.
    `runs` has the columns `params.*` and `metrics.*`. Axes are logarithmic for the parameters in `log`, and list the
    values of those that are texts. Runs that lack a parameter or the metric are left out.

    Raises:
        ValueError: there is no run to draw, a column is missing, or there are fewer than two parameters.
    """
    complete = _complete(runs, [f"params.{name}" for name in params], f"metrics.{metric}")
    complete = complete.sort_values(f"metrics.{metric}")  # the best are drawn last, over the others
    figure, axis = _axes(f"{len(complete)} runs by {metric}")
    heights, names = [], []
    for place, name in enumerate(params):
        values = complete[f"params.{name}"]
        height, ticks = _scale(values, name in log)
        heights.append(height)
        names.append(f"{name}\n(log scale)" if name in log else name)
        _draw_scale(axis, place, ticks)
    places = np.broadcast_to(np.arange(len(params)), (len(complete), len(params)))
    lines = LineCollection(np.dstack([places, np.transpose(heights)]), cmap="cividis_r", linewidths=2)
    values = complete[f"metrics.{metric}"]
    lines.set_array(values.to_numpy())
    lines.set_clim(values.median(), values.max())
    axis.add_collection(lines)
    axis.set(xticks=range(len(params)), xticklabels=names, yticks=[], xlim=(-0.3, len(params) - 0.5), ylim=(-0.1, 1.1))
    axis.tick_params(bottom=False, pad=10)
    axis.spines[:].set_visible(False)
    figure.colorbar(lines, ax=axis, label=metric, extend="min")
    return figure


def call_times(timings: pd.DataFrame) -> Figure:
    """Draw the time of a call and the images per second by batch size, one line for each way of calling.

    `timings` has the columns way, images (in a call), milliseconds (of a call), images_per_second.
    """
    titles = {"milliseconds": "median milliseconds of a call", "images_per_second": "images per second"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for number, (way, line) in enumerate(timings.groupby("way", sort=False)):
            style = STYLES[number % len(STYLES)] + MARKERS[number % len(MARKERS)]
            axis.plot(line["images"], line[column], style, color=COLORS[number % len(COLORS)], label=way)
        axis.set(xscale="log", yscale="log", xlabel="images in a call", title=title)
        axis.set_xticks(timings["images"].unique(), timings["images"].unique())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
    axes[0].legend()
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.set_title(title)
    return figure, axis


def _label(axis: Axes, quantity: str) -> None:
    axis.set(xlabel="optimizer step", ylabel=quantity)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def _metric(history: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of the metric."""
    rows = history[history["metric"] == metric] if len(history) else history
    if rows.empty:
        raise ValueError(f"there is no point of {metric} to draw: check the run ids and the metric's name.")
    return rows


def _complete(runs: pd.DataFrame, params: list[str], metric: str) -> pd.DataFrame:
    """Return the rows that have all the parameters and the metric."""
    if runs.empty:
        raise ValueError("there is no run to draw: the frame is empty.")
    if len(params) < 2:
        raise ValueError("parallel coordinates need two parameters or more.")
    if missing := [column for column in [*params, metric] if column not in runs]:
        raise ValueError(f"the runs have no column {missing[0]}; they have {', '.join(map(str, runs))}.")
    complete = runs.dropna(subset=[*params, metric])
    if complete.empty:
        raise ValueError(f"there is no run to draw: none has all of {', '.join([*params, metric])}.")
    return complete


def _scale(values: pd.Series, log: bool) -> tuple[np.ndarray, dict[float, str]]:
    """Return heights from 0 to 1, and the texts to write at some heights."""
    if not pd.api.types.is_numeric_dtype(values):
        texts = sorted(values.unique())
        at = dict(zip(texts, np.linspace(0, 1, len(texts)) if len(texts) > 1 else [0.5], strict=True))
        return values.map(at).to_numpy(float), {height: str(text) for text, height in at.items()}
    low, high = values.min(), values.max()
    if low == high:
        return np.full(len(values), 0.5), {0.5: f"{low:.4g}"}
    ticks = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"}
    if log:
        return np.log(values / low).to_numpy() / np.log(high / low), ticks
    return ((values - low) / (high - low)).to_numpy(), ticks


def _draw_scale(axis: Axes, place: int, ticks: Mapping[float, str]) -> None:
    """Draw a parameter's axis; its ends are written below and above, so that no line crosses them."""
    axis.axvline(place, color="0.3", linewidth=1, ymin=0.1 / 1.2, ymax=1.1 / 1.2)
    ends = {0.0: {"y": -0.03, "va": "top", "ha": "center"}, 1.0: {"y": 1.03, "va": "bottom", "ha": "center"}}
    for height, text in ticks.items():
        position = ends.get(height, {"y": height, "va": "center", "ha": "left"})
        axis.text(x=place, s=text if height in ends else f" {text}", **position)
