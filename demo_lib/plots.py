"""Matplotlib figures for the lessons; they draw what they are given and ask no store."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor


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
