"""The network of the lessons, built from a configuration."""

from collections import OrderedDict

from demo_lib.config import TrainConfig
from demo_lib.data import CLASSES

import torch
from torch import Tensor, nn

# Mean and standard deviation of the training images' pixels, scaled to [0, 1].
MEAN, STD = 0.2860, 0.3530


class FashionNet(nn.Module):
    """Five 3x3 convolutions in three stages, then one linear layer.

    Takes float32 images in [0, 1] of shape (B, 1, 28, 28) and returns logits of shape (B, 10). `channels` is the width
    of the first convolution; the others are 2, 3, 4 and 6 times as wide. Pooling comes before batch norm and ReLU,
    which then have a quarter of the work.
    """

    def __init__(self, channels: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [channels * factor for factor in (1, 2, 3, 4, 6)]
        self.features = nn.Sequential(
            OrderedDict(
                stem=_block(1, widths[0], pool=True),
                conv2=_block(widths[0], widths[1]),
                conv3=_block(widths[1], widths[2], pool=True),
                conv4=_block(widths[2], widths[3]),
                conv5=_block(widths[3], widths[4], pool=True),
            )
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(widths[4] * 9, len(CLASSES)))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the images."""
        return self.classifier(self.features((images - MEAN) / STD))


def build_model(config: TrainConfig) -> FashionNet:
    """Build the network of the configuration, its weights drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    return FashionNet(config.channels, config.dropout)


def _block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU())
