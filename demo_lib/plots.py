"""Matplotlib figures for the lessons; they draw what they are given and ask no store."""

from collections.abc import Sequence

from demo_lib.config import DemoError

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.figure import Figure

COLORS = color_sequences["petroff8"]  # told apart by colour-blind people


def image_grid(images: Sequence, titles: Sequence[str], columns: int = 5) -> Figure:
    """Draw grey images of shape (N, 1, 28, 28) in rows of `columns`, each under its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(np.asarray(image).squeeze(), cmap="gray_r")
        axis.set_title(title, fontsize=9)
    return figure


def loss_curve(history: pd.DataFrame, title: str) -> Figure:
    """Draw one run's `train_loss` by optimizer step, and its `val_loss` with a thin line at each epoch's end.

    `history` has the columns run_id, metric, step, value. Without a `train_loss`, or with several runs: a DemoError.
    """
    train, validation = (history[history["metric"] == f"{name}_loss"] for name in ("train", "val"))
    if train["run_id"].nunique() != 1:
        raise DemoError("a loss curve shows the train_loss of one run: select the rows of one run_id that has it.")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.set(title=title, xlabel="optimizer step", ylabel="cross-entropy")
    axis.plot(train["step"], train["value"], color=COLORS[0], label="train_loss")
    if len(validation):
        axis.plot(validation["step"], validation["value"], "s--", color=COLORS[1], label="val_loss")
    for number, end in enumerate(validation["step"]):
        axis.axvline(end, color="0.6", linewidth=1, zorder=0, label=None if number else "end of an epoch")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
