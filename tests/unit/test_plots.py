"""The figures show what they are given."""

from demo_lib.plots import image_grid

import torch


def test_image_grid_draws_each_image_under_its_title():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 28, 28)
    figure = image_grid(images, [f"image {index}" for index in range(7)])
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [f"image {index}" for index in range(7)]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in drawn] == list(range(7))
    assert len(figure.axes) == 10
