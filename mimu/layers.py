"""A layer whose weight can be masked: how its values are laid out, and records of what it does on samples."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mimu.operations import CONVOLUTIONS, argument, name_of


@dataclass(frozen=True)
class Layer:
    """A weight that one linear operation or convolution of a network reads.

    Args:
        node: the operation
        shape: that of the weight, (m, n) or (m, channels, *kernel)
        activation: the operation that gives the output activation
        is_rectified: whether the output activation is that of a ReLU
        batch: the dimension of the operation's values that holds the samples
        parts: how many entries of that dimension belong to one sample
        in_order: True if the dimension holds one sample after the other, False if part-major: all samples of part 0,
            then of part 1
        positions: at how many positions of a sample the weight is applied, such as tokens or pixels; None for a single
            one, as on features
        sources: the numbers of the neurons that it reads (`joined_neurons`)
        targets: the numbers of the neurons that it gives
    """

    node: fx.Node
    shape: tuple[int, ...]
    activation: fx.Node
    is_rectified: bool
    batch: int
    parts: int
    in_order: bool
    positions: int | None
    sources: range
    targets: range

    @property
    def is_convolution(self) -> bool:
        return name_of(self.node) in CONVOLUTIONS

    @property
    def groups(self) -> int:
        """The number of groups into which a convolution's rows and input channels are divided."""
        return argument(self.node, "groups") if self.is_convolution else 1

    @property
    def numbers(self) -> int:
        """The size of a record, in numbers per sample."""
        return (self.groups * prod(self.shape[1:]) + 3 * self.shape[0]) * (self.positions or 1)

    def record(self, x: Tensor, h: Tensor, gradient: Tensor) -> "LayerRecord":
        """A record of samples.

        Args:
            x: the operation's input
            h: the output activation
            gradient: that of the log-odds by the operation's output
        """
        active = (h > 0).to(h.dtype) if self.is_rectified else torch.ones_like(h)
        inputs = self.read(x)
        h, active, gradient = map(self.by_position, (h, active, gradient))
        if self.groups > 1:
            inputs, gradient = inputs.contiguous(), gradient.contiguous()
        if self.positions is None:
            return FeatureRecord(inputs, h, active, gradient)
        return PositionRecord(inputs, h, active, gradient @ inputs.mT)

    def by_sample(self, x: Tensor) -> Tensor:
        """Values of the operation with the samples in front, (samples, parts, ...)."""
        x = x.movedim(self.batch, 0)
        return x.unflatten(0, (-1, self.parts)) if self.in_order else x.unflatten(0, (self.parts, -1)).transpose(0, 1)

    def by_position(self, x: Tensor) -> Tensor:
        """The operation's output as (samples, groups, m / groups, positions), or (samples, m) on features."""
        x = self.by_sample(x)
        x = x.flatten(3).movedim(2, -1) if self.is_convolution else x  # (samples, parts, ..., m)
        return self._laid_out(x.reshape(len(x), self.positions or 1, self.groups, -1).permute(0, 2, 3, 1))

    def read(self, x: Tensor) -> Tensor:
        """The numbers that the weight is multiplied with, from the operation's input.

        Returns: (samples, groups, n, positions), in memory position after position, as products over samples and
            positions are fastest then; or (samples, n) on features
        """
        if not self.is_convolution:
            return self._laid_out(self.by_sample(x).flatten(1, -2).mT[:, None])
        # To (batch, groups, *places, channels, *kernel).
        x = self.windows(x).unflatten(1, (self.groups, -1)).movedim(2, len(self.shape))
        x = self.by_sample(x.reshape(len(x), self.groups, (self.positions or 1) // self.parts, -1))
        return self._laid_out(x.movedim(1, 2).flatten(2, 3).mT)

    def mean_read(self, x: Tensor) -> Tensor:
        """The mean of `read` over the positions, (samples, groups * n). A convolution's patches are not copied."""
        if not self.is_convolution:
            x = self.read(x)
            return x if self.positions is None else x.flatten(1, 2).mean(2)
        places = [*range(2, len(self.shape))]
        return self.by_sample(self.windows(x).mean(places).flatten(1)).mean(1)

    def windows(self, x: Tensor) -> Tensor:
        """The patches that a convolution reads, as a view of the padded input, (batch, channels, *places, *kernel)."""
        kernel, padding = self.shape[2:], argument(self.node, "padding")
        strides, dilations = self._by_dimension("stride"), self._by_dimension("dilation")
        if isinstance(padding, str):
            totals = [dilation * (size - 1) * (padding == "same") for size, dilation in zip(kernel, dilations)]
        else:
            totals = [2 * each for each in self._by_dimension("padding")]
        # F.pad takes the last dimension first.
        x = F.pad(x, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
        for dim, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations), 2):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x

    def _by_dimension(self, name: str) -> list[int]:
        """An argument of the convolution for each dimension of its kernels."""
        values, count = argument(self.node, name), len(self.shape) - 2
        return [*values] * count if len(values) == 1 else [*values]

    def _laid_out(self, x: Tensor) -> Tensor:
        """Values (samples, groups, neurons, positions), or (samples, neurons) on features."""
        return x[:, 0, :, 0] if self.positions is None else x


class FeatureRecord(NamedTuple):
    """The record of a layer that is applied once to each sample.

    The gradient of sample s's log-odds by the weight is the outer product `log_odds_gradient[s] inputs[s]^T`. Sums
    over samples take a factor of each sample, (samples), and have the shape (1, m, n) or one that broadcasts to it.
    """

    inputs: Tensor  # (samples, n), the input activation a
    outputs: Tensor  # (samples, m), the output activation h: after the ReLU, or the logits for the output layer
    active: Tensor  # (samples, m), 1 where the unit passes a signal on; a unit without ReLU always does
    log_odds_gradient: Tensor  # (samples, m), gradient of the label's log-odds at the pre-activation

    def gradient(self, factor: Tensor) -> Tensor:
        """The sum of the log-odds' gradient times a factor."""
        return ((self.log_odds_gradient * factor[:, None]).T @ self.inputs)[None]

    def squared_gradient(self, factor: Tensor) -> Tensor:
        """The sum of the squared gradient times a factor."""
        return ((self.log_odds_gradient**2 * factor[:, None]).T @ self.inputs**2)[None]

    def signal(self, factor: Tensor) -> Tensor:
        """The sum of the input, where the target neuron is active, times a factor."""
        return ((self.active * factor[:, None]).T @ self.inputs)[None]

    def input(self, factor: Tensor) -> Tensor:
        """The sum of the input activation times a factor, (1, 1, n)."""
        return (factor @ self.inputs)[None, None]

    def output(self, factor: Tensor) -> Tensor:
        """The sum of the output activation times a factor, (1, m, 1)."""
        return (factor @ self.outputs)[None, :, None]

    def log_odds_drop(self, weight: Tensor, removed: Tensor) -> Tensor:
        """The first-order fall of the log-odds when some weights become 0, (samples).

        A weight w from neuron c to r that is zeroed takes w a_c from the pre-activation of r.

        Args:
            weight: (1, m, n)
            removed: indices in the flat weight
        """
        n = weight.shape[2]
        g, a = self.log_odds_gradient.index_select(1, removed // n), self.inputs.index_select(1, removed % n)
        return (g * a) @ weight.take(removed)

    def for_updates(self) -> "FeatureRecord":
        """The record with what first-order updates need."""
        return self


class PositionRecord(NamedTuple):
    """The record of a layer that is applied at many positions of each sample, such as pixels or tokens.

    Sums over samples take a factor of each sample, (samples), and have the shape (groups, m, n) or one that broadcasts
    to it. Activations are means over the positions.
    """

    inputs: Tensor  # (samples, groups, n, positions), the numbers that the kernels read
    outputs: Tensor  # (samples, groups, m, positions), m rows of each group
    active: Tensor  # (samples, groups, m, positions), 1 where the unit passes a signal on
    weight_gradient: Tensor  # (samples, groups, m, n), gradient of the label's log-odds by the weight

    def gradient(self, factor: Tensor) -> Tensor:
        """The sum of the log-odds' gradient times a factor."""
        return weighted_sum(self.weight_gradient, factor)

    def squared_gradient(self, factor: Tensor) -> Tensor:
        """The sum of the squared gradient times a factor."""
        return weighted_sum(self.weight_gradient.square(), factor)

    def signal(self, factor: Tensor) -> Tensor:
        """The sum of the input, where the target neuron is active, times a factor."""
        return weighted_sum(self.active @ self.inputs.mT, factor) / self.inputs.shape[3]

    def input(self, factor: Tensor) -> Tensor:
        """The sum of the input activation times a factor, (groups, 1, n)."""
        return weighted_sum(self.inputs.mean(3), factor)[:, None]

    def output(self, factor: Tensor) -> Tensor:
        """The sum of the output activation times a factor, (groups, m, 1)."""
        return weighted_sum(self.outputs.mean(3), factor)[..., None]

    def log_odds_drop(self, weight: Tensor, removed: Tensor) -> Tensor:
        """The first-order fall of the log-odds when some weights become 0, (samples).

        Args:
            weight: (groups, m, n)
            removed: indices in the flat weight
        """
        return self.weight_gradient.flatten(1).index_select(1, removed) @ weight.take(removed)

    def for_updates(self) -> "PositionRecord":
        """The record with what first-order updates need, the gradient alone."""
        nothing = self.inputs.new_empty(0)
        return PositionRecord(nothing, nothing, nothing, self.weight_gradient)


def weighted_sum(x: Tensor, factor: Tensor) -> Tensor:
    """The sum of x (samples, ...) times a factor (samples), (...)."""
    return (factor @ x.flatten(1)).view(x.shape[1:])


LayerRecord = FeatureRecord | PositionRecord


class Record(NamedTuple):
    """The records of some layers on a batch, and the log-odds log(p / (1 - p)) of the label of every sample.

    All losses follow from the log-odds: -log p has the derivative p - 1 by them, -log(1 - p) has p.
    """

    layers: list[LayerRecord]
    log_odds: Tensor  # (samples)
    kept_log_odds: Tensor  # (samples), those that unlearning should leave to the sample; by default the same
