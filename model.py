"""The classifiers that runs train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.tracing import HookedClassifier, Trace

WHITENED_BY = 1000  # images, every n-th of those at hand
LEAST_VARIANCE = 5e-4  # that is added to that of a direction of patches, which may be none


def mlp(sizes: Sequence[int], bias: bool) -> nn.Sequential:
    """Linear layers with ReLU between them: pixels (batch, sizes[0]) to logits (batch, sizes[-1])."""
    modules: list[nn.Module] = [nn.Flatten()]
    for n, m in zip(sizes, sizes[1:]):
        modules += [nn.Linear(n, m, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def pixels_left(height: int, width: int, channels: Sequence[int]) -> int:
    """How many there are after max pooling for each of the channels. Raises ValueError where none is."""
    left = (height >> len(channels)) * (width >> len(channels))
    if not left:
        raise ValueError(f"channels must be fewer than {len(channels)}: nothing is left of {height} x {width} pixels")
    return left


def cnn(
    size: tuple[int, int, int], channels: Sequence[int], sizes: Sequence[int], bias: bool, batch_norm: bool
) -> nn.Sequential:
    """Convolutions of 3 x 3 with ReLU and max pooling, then an mlp (after LeCun et al. 1998, LeNet-5).

    size: of an image, channels, height and width; sizes: of the layers of the mlp, the logits last
    Raises ValueError where nothing of an image is left after the last pooling.
    """
    network = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size))
    for n, m in zip([size[0], *channels], channels):
        normalised = [nn.BatchNorm2d(m)] if batch_norm else []
        network.extend([nn.Conv2d(n, m, 3, padding=1, bias=bias), *normalised, nn.ReLU(), nn.MaxPool2d(2)])
    network.extend(mlp([channels[-1] * pixels_left(*size[1:], channels), *sizes], bias))
    return network.to(memory_format=torch.channels_last)  # on a CPU convolutions take a third less time


def airbench(
    size: tuple[int, int, int], channels: Sequence[int], sizes: Sequence[int], bias: bool, blocks: int
) -> nn.Sequential:
    """A convolution of 2 x 2 to `whiten`, stages of 3 x 3, the largest value of every channel, and an mlp.

    After Jordan 2024, arXiv:2404.00498, with SiLU. size, sizes, raises: as `cnn`
    blocks: convolutions of a stage, all with batch normalisation, the first with max pooling before it
    """

    def convolution(n: int, m: int, *pooling: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(n, m, 3, padding=1, bias=False), *pooling, nn.BatchNorm2d(m), nn.SiLU()]

    pixels_left(size[1] - 1, size[2] - 1, channels)
    whitened = 2 * 4 * size[0]
    network = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size), nn.Conv2d(size[0], whitened, 2), nn.SiLU())
    for n, m in zip([whitened, *channels], channels):
        network.extend(convolution(n, m, nn.MaxPool2d(2)))
        for _ in range(1, blocks):
            network.extend(convolution(m, m))
    network.extend([nn.AdaptiveMaxPool2d(1), *mlp([channels[-1], *sizes], bias)])
    return network.to(memory_format=torch.channels_last)


@torch.no_grad()
def whiten(network: nn.Sequential, images: Tensor) -> None:
    """Gives the first layer of an `airbench` kernels that whiten the patches of images, and their negatives.

    Each is an eigenvector of the patches' second moments over the root of its eigenvalue: Jordan 2024, section 3.1.
    """
    some = network[:2](images[:: max(1, len(images) // WHITENED_BY)].cpu())  # (samples, channels, height, width)
    patches = F.unfold(some, network[2].kernel_size).movedim(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernels = (vectors / (values + LEAST_VARIANCE).sqrt()).T
    network[2].weight.copy_(torch.cat([kernels, -kernels]).view_as(network[2].weight))


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


class HookedMNISTClassifier(HookedClassifier):
    """Multilayer perceptron with ReLU between its linear layers.

    Shapes: images (batch, 28, 28) or (batch, 784) to logits (batch, classes).
    """

    def __init__(
        self, hidden_sizes: Sequence[int] = (128, 64), in_features: int = 784, num_classes: int = 10, bias: bool = False
    ) -> None:
        sizes = (in_features, *hidden_sizes, num_classes)
        super().__init__(mlp(sizes, bias), TRACES.get((sizes, bias), torch.zeros(2, in_features)))
        TRACES[sizes, bias] = self.trace


TRACES: dict[tuple[tuple[int, ...], bool], Trace] = {}  # of perceptrons, whatever their weights are
