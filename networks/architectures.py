"""The classifiers that a config can ask for, of images given as pixels: channel, row, column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], bias: bool) -> nn.Sequential:
    """Linear layers with ReLU between them: pixels (batch, sizes[0]) to logits (batch, sizes[-1])."""
    modules: list[nn.Module] = [nn.Flatten()]
    for n, m in zip(sizes, sizes[1:]):
        modules += [nn.Linear(n, m, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def cnn(
    size: tuple[int, int, int],
    channels: Sequence[int],
    sizes: Sequence[int],
    bias: bool,
    batch_norm: bool,
    blocks: int = 1,
) -> nn.Sequential:
    """Stages of convolutions of 3 x 3 with ReLU, then an mlp (after LeCun et al. 1998, LeNet-5).

    size: of an image, channels, height and width; sizes: of the layers of the mlp, the logits last
    blocks: convolutions of a stage, the first with max pooling behind it. Of several, channels[0] are those of one
        before the stages, and the mlp is given the largest value of every channel alone.
    Raises ValueError where nothing of an image is left after the last pooling.
    """

    def convolution(n: int, m: int) -> list[nn.Module]:
        normalised = [nn.BatchNorm2d(m)] if batch_norm else []
        return [nn.Conv2d(n, m, 3, padding=1, bias=bias), *normalised, nn.ReLU()]

    network = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size))
    read = size[0]
    if blocks > 1:
        read, *channels = channels
        network.extend(convolution(size[0], read))
    left = (size[1] >> len(channels)) * (size[2] >> len(channels))
    if not left:
        fewer = len(channels) + (blocks > 1)
        raise ValueError(f"channels must be fewer than {fewer}: nothing is left of {size[1:]} pixels")
    for n, m in zip([read, *channels], channels):
        network.extend([*convolution(n, m), nn.MaxPool2d(2)])
        for _ in range(1, blocks):
            network.extend(convolution(m, m))
    if blocks > 1:
        network.append(nn.AdaptiveMaxPool2d(1))
        left = 1
    network.extend(mlp([channels[-1] * left, *sizes], bias))
    return network.to(memory_format=torch.channels_last)  # on a CPU convolutions take a third less time


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, whose output is added to the input; where shapes differ, to a projection of it."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        is_same = n == m and stride == 1
        projection = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))
        self.shortcut = nn.Identity() if is_same else projection
        self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(m)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(inner)) + self.shortcut(x)).relu()


def resnet(size: tuple[int, int, int], channels: Sequence[int], blocks: int, num_classes: int) -> nn.Sequential:
    """Stages of residual blocks, each half as high and wide as the one before (He et al. 2016, arXiv:1512.03385).

    With three stages of one block it is ResNet-8, of two blocks ResNet-14: the convolutions but for projections, and
    the linear layer behind a mean over all positions.
    """
    network = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size))
    network.extend([nn.Conv2d(size[0], channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()])
    for stage, (n, m) in enumerate(zip([channels[0], *channels], channels)):
        network.append(ResidualBlock(n, m, 1 if stage == 0 else 2))
        network.extend(ResidualBlock(m, m, 1) for _ in range(1, blocks))
    network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes)])
    return network.to(memory_format=torch.channels_last)


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, encoder layers, a linear layer on the mean of the tokens (arXiv:2010.11929).

    size: of an image, channels, height and width; width: features of a token; hidden: units within a block
    Raises ValueError where an image has no patch, or the width cannot be shared out among the heads.
    """

    def __init__(
        self, size: tuple[int, int, int], patch: int, width: int, hidden: int, heads: int, blocks: int, num_classes: int
    ) -> None:
        super().__init__()
        tokens = (size[1] // patch) * (size[2] // patch)
        if not tokens:
            raise ValueError(f"patch must be at most {min(size[1:])}, not {patch}: there is none in {size[1:]} pixels")
        if width % heads:
            raise ValueError(f"heads must divide the width, channels of {[width]}, not {heads}")
        self.image = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size))
        self.patches = nn.Conv2d(size[0], width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        settings = {"dropout": 0.0, "activation": nn.functional.gelu, "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, heads, hidden, **settings) for _ in range(blocks)]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.image(x)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens).mean(1)))
