"""The classifiers that runs train, and the registry of their architectures."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.hooked import HookedClassifier
from mimu.tracing import Trace

WHITENED_BY = 1000  # images, evenly spaced among those given
LEAST_VARIANCE = 5e-4  # added to the variance of each direction of patches, which may be 0

Size = tuple[int, int, int]  # channels, height and width of an image


def mlp(sizes: Sequence[int], bias: bool) -> nn.Sequential:
    """Linear layers with ReLU between them: pixels (batch, sizes[0]) to logits (batch, sizes[-1])."""
    modules: list[nn.Module] = [nn.Flatten()]
    for n, m in zip(sizes, sizes[1:]):
        modules += [nn.Linear(n, m, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def image_size(config: Any, size: Sequence[int]) -> Size:
    """Channels, height and width of images. Raises ValueError if the config names no channels for them."""
    if not config.channels:
        raise ValueError(f"channels must name one at least for {config.architecture}")
    return (1, *size) if len(size) == 2 else tuple(size)


def pooled_pixels(height: int, width: int, channels: Sequence[int]) -> int:
    """The number of pixels after one max pooling for each of the channels. Raises ValueError if none remains."""
    pixels = (height >> len(channels)) * (width >> len(channels))
    if not pixels:
        raise ValueError(f"channels must be fewer than {len(channels)}: nothing is left of {height} x {width} pixels")
    return pixels


def convolutional(size: Size, modules: Sequence[nn.Module]) -> nn.Sequential:
    """Modules on images, which may be given as rows of pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Unflatten(1, size), *modules)
    return network.to(memory_format=torch.channels_last)  # on a CPU convolutions take a third less time


def cnn(config: Any, size: Sequence[int], sizes: Sequence[int]) -> nn.Sequential:
    """Convolutions of 3 x 3 with ReLU and max pooling, then an mlp (after LeCun et al. 1998, LeNet-5)."""
    image, channels = image_size(config, size), config.channels
    modules: list[nn.Module] = []
    for n, m in zip([image[0], *channels], channels):
        modules += [nn.Conv2d(n, m, 3, padding=1, bias=config.bias), nn.ReLU(), nn.MaxPool2d(2)]
    features = channels[-1] * pooled_pixels(image[1], image[2], channels)
    return convolutional(image, modules + [*mlp([features, *sizes], config.bias)])


def airbench(config: Any, size: Sequence[int], sizes: Sequence[int]) -> nn.Sequential:
    """A whitening convolution of 2 x 2, stages of 3 x 3, the largest value of every channel, and an mlp.

    After Jordan 2024, arXiv:2404.00498, with SiLU. A stage has `config.blocks` convolutions, all with batch
    normalisation, the first with max pooling before it.
    """
    image, channels = image_size(config, size), config.channels
    pooled_pixels(image[1] - 1, image[2] - 1, channels)
    whitened = 2 * 4 * image[0]
    modules: list[nn.Module] = [nn.Conv2d(image[0], whitened, 2), nn.SiLU()]
    for n, m in zip([whitened, *channels], channels):
        modules += [nn.Conv2d(n, m, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(m), nn.SiLU()]
        for _ in range(1, config.blocks):
            modules += [nn.Conv2d(m, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.SiLU()]
    return convolutional(image, [*modules, nn.AdaptiveMaxPool2d(1), *mlp([channels[-1], *sizes], config.bias)])


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
    """Two convolutions of 3 x 3, whose output is added to the input, or to a projection of it if shapes differ."""

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


def resnet(config: Any, size: Sequence[int], sizes: Sequence[int]) -> nn.Sequential:
    """Stages of residual blocks, each half as high and wide as the one before (He et al. 2016, arXiv:1512.03385).

    Three stages of one block are ResNet-8, of two blocks ResNet-14: the convolutions except projections, and the linear
    layer on the mean over all positions. Of `sizes` only the last one counts, the number of classes.
    """
    image, channels = image_size(config, size), config.channels
    first = channels[0]
    modules = [nn.Conv2d(image[0], first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    for stage, (n, m) in enumerate(zip([first, *channels], channels)):
        modules.append(ResidualBlock(n, m, 1 if stage == 0 else 2))
        modules += [ResidualBlock(m, m, 1) for _ in range(1, config.blocks)]
    return convolutional(image, [*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], sizes[-1])])


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, encoder layers, a linear layer on the mean of the tokens (arXiv:2010.11929).

    Args:
        size: of an image
        width: features of a token
        hidden: units of a block's perceptron
    Raises:
        ValueError: if an image has no patch, or the heads do not divide the width
    """

    def __init__(
        self, size: Size, patch: int, width: int, hidden: int, heads: int, blocks: int, num_classes: int
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


def vit(config: Any, size: Sequence[int], sizes: Sequence[int]) -> VisionTransformer:
    """The transformer of a config, which must name one number of channels and one of hidden units."""
    image, widths = image_size(config, size), [*config.channels, *sizes]
    if len(config.channels) != 1 or len(sizes) != 2:
        raise ValueError(f"channels and hidden_sizes must each be one number for vit, not {widths[:-1]}")
    return VisionTransformer(image, config.patch, widths[0], widths[1], config.heads, config.blocks, widths[2])


def layer_sizes(config: Any, shapes: Sequence[Sequence[int]]) -> str:
    """The sizes of all layers, such as `cnn 1-4-6-9-10 with biases`."""
    sizes = "-".join(map(str, [shapes[0][1], *(shape[0] for shape in shapes)]))
    return ("" if config.architecture == "mlp" else config.architecture + " ") + sizes + " with biases" * config.bias


class Architecture(NamedTuple):
    """An architecture that a `TrainerConfig` can name.

    build: makes the network from the config, the size of images ([channels,] height, width; for an mlp also the number
        of pixels alone) and the sizes of the last layers (`hidden_sizes` and the number of classes); raises ValueError
        naming a setting that does not fit
    describe: puts the config and the shapes of the weights into words
    initialise: sets weights of a new network by training images (samples, pixels)
    """

    build: Callable[[Any, Sequence[int], Sequence[int]], nn.Module]
    describe: Callable[[Any, Sequence[Sequence[int]]], str] = layer_sizes
    initialise: Callable[[nn.Module, Tensor], None] = lambda network, images: None


ARCHITECTURES = {
    "mlp": Architecture(lambda c, size, sizes: mlp([prod(size), *sizes], c.bias)),
    "cnn": Architecture(cnn),
    "airbench": Architecture(airbench, initialise=whiten),
    "resnet": Architecture(resnet, lambda c, _: f"ResNet-{2 + 2 * len(c.channels) * c.blocks}"),
    "vit": Architecture(vit, lambda c, _: f"ViT/{c.patch} {c.channels[0]}-{c.hidden_sizes[0]}, blocks: {c.blocks}"),
}


TRACES: dict[tuple[tuple[int, ...], bool], Trace] = {}  # of perceptrons with any weights, by their sizes and bias


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
