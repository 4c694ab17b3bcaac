"""Networks that can be looked into: run node by node, begun midway, recorded, and run with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mimu.networks.tracing import Trace, call, is_weight_layer

Layers = Sequence[int]  # by their indices among the weight layers
NUMBERS_AT_ONCE = 2**26  # of float32 in the tensors of a pass over samples, which then takes some 256 MB


class LayerRecord(NamedTuple):
    """What one layer did on a batch.

    The gradient of sample s's log-odds by the weight is `log_odds_gradient[s] inputs[s]^T`. Of a convolution every
    tensor is (samples, groups, neurons of each group, positions), and that product sums over positions.
    """

    inputs: Tensor  # (samples, n), the input activation a; of a convolution what its kernels read, n numbers each
    outputs: Tensor  # (samples, m), the output activation h: after the ReLU, or the logits for the output layer
    active: Tensor  # (samples, m), 1 where the unit passes a signal on; a unit without ReLU always does
    log_odds_gradient: Tensor  # (samples, m), gradient of the label's log-odds at the pre-activation

    def each(self, change: Callable[[Tensor], Tensor]) -> LayerRecord:
        """The same with every tensor changed."""
        return LayerRecord(*map(change, self))

    def times(self, factor: Tensor) -> LayerRecord:
        """The same with every sample's gradient times a factor (samples), or of (classes, samples) for all groups."""
        gradient = self.log_odds_gradient
        factor = factor.repeat_interleave(len(gradient) // len(factor), 0)
        ending = (1,) * (gradient.ndim - factor.ndim)
        return self._replace(log_odds_gradient=gradient * factor.view(factor.shape + ending))


class Record(NamedTuple):
    """What some layers did on a batch, and the log-odds log(p / (1 - p)) of the label of every sample.

    All losses follow from the log-odds: -log p has the derivative p - 1 by them, -log(1 - p) has p.
    """

    layers: list[LayerRecord]
    log_odds: Tensor  # (samples)
    kept_log_odds: Tensor  # (samples), what they are to stay: as they are, if none has said otherwise


def weight_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that masks can be put on, linear ones and convolutions, in the order in which they were added."""
    return [module for module in model.modules() if is_weight_layer(module)]


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight: (m, n), or of a convolution (m, channels, height, width)."""
    return tuple(layer.weight.shape)


def is_finite(model: nn.Module) -> bool:
    """Whether all its weights are finite numbers."""
    return all(weight.isfinite().all() for weight in model.state_dict().values())


class HookedClassifier(nn.Module):
    """A network of linear layers and convolutions that is run node by node, so that it can be looked into.

    It can begin midway: at the last place before some layers where a single value is all that the rest needs, so that
    nothing before that place is computed twice. In evaluation mode throughout, but for its training.

    Shapes: images (batch, ...), as the network takes them, to logits (batch, classes).
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        """example: some images, on which the network is traced. Raises ValueError where it cannot be."""
        super().__init__()
        self.network = network
        self.eval()
        self.trace = Trace(network, example)

    @property
    def layers(self) -> list[nn.Module]:
        return weight_layers(self)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight, in the order of the layers: (out, in), or that of kernels."""
        return [shape_of(layer) for layer in self.layers]

    def forward(self, images: Tensor, first: Layers | None = None) -> Tensor:
        """Logits (batch, classes); with `first`, `images` are `prefix_activations` of these layers."""
        if torch.is_grad_enabled():
            return self.outputs(images, first)[1]
        return torch.cat([self.outputs(part, first)[1] for part in images.split(self.samples_at_once)])

    def outputs(
        self, inputs: Tensor, first: Layers | None = None, weights: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The representation, which the last layer is given, (batch, n), and the logits (batch, classes).

        inputs: images, or with `first`, `prefix_activations` of these layers
        weights: by layer, in the place of its own; gradients then reach these and no parameter
        """
        trace = self.trace
        changed = {trace.calls[index]: weight for index, weight in (weights or {}).items()}

        def compute(node: fx.Node, callee: Any, arguments: tuple, named: dict) -> Any:
            if node in changed:
                return with_weight(callee, arguments[0], changed[node])
            return call(node, callee, arguments, named)

        with self._constant() if changed else nullcontext():
            values = trace.run(self.network, inputs, first, compute, [trace.representation])
        return values[trace.representation], values[trace.output]

    @torch.no_grad()
    def value_of(self, node: fx.Node, inputs: Tensor, first: Layers | None = None) -> Tensor:
        """What a node of the trace gives, for images (batch, ...), or with `first`, for `prefix_activations` of it."""
        parts = inputs.split(self.samples_at_once)
        return torch.cat([self.trace.run(self.network, part, first, end=node)[node] for part in parts])

    def prefix_activations(self, layers: Layers, inputs: Tensor, first: Layers | None = None) -> Tensor:
        """What stands for images (batch, ...) where the network can begin before the layers."""
        return self.value_of(self.trace.start_of(layers), inputs, first)

    @torch.no_grad()
    def layer_inputs(self, index: int, images: Tensor) -> Iterator[Tensor]:
        """What one layer is given by samples, some at a time, (samples, positions, n), one position of a linear one."""
        layer = self.layers[index]
        node = self.trace.calls[index].all_input_nodes[0]
        for part in images.split(self.recorded_at_once([index])):
            x = self.trace.run(self.network, part, end=node)[node]
            yield patches(layer, x).mT if isinstance(layer, nn.Conv2d) else x[:, None]

    def mean_inputs(self, index: int, inputs: Tensor, first: Layers | None = None) -> Tensor:
        """What one layer is given by samples, its mean over positions (samples, n)."""
        layer = self.layers[index]
        x = self.value_of(self.trace.calls[index].all_input_nodes[0], inputs, first)
        return mean_patches(layer, x) if isinstance(layer, nn.Conv2d) else x

    @torch.enable_grad()
    def record(
        self, inputs: Tensor, labels: Tensor, layers: Layers, first: Layers | None = None, left_out: Sequence[int] = ()
    ) -> Record:
        """What `layers` do on a batch: a forward pass, and a backward one as far as their pre-activations.

        inputs: images, or with `first`, what `prefix_activations` says of these layers; labels: (samples)
        left_out: as `log_odds` takes it
        """
        trace, modules = self.trace, self.layers
        calls = [trace.calls[index] for index in layers]
        given: dict[fx.Node, Tensor] = {}

        def compute(node: fx.Node, callee: Any, arguments: tuple, named: dict) -> Any:
            value = call(node, callee, arguments, named)
            if node in calls:
                given[node] = arguments[0].detach()
                # The autograd graph begins at the first of them.
                value = value if value.requires_grad else value.detach().requires_grad_()
            return value

        with self._constant():
            watched = [*calls, *(trace.activations[index][0] for index in layers)]
            values = trace.run(self.network, inputs.detach(), first, compute, watched)
        found = log_odds(values[trace.output], labels, left_out)
        gradients = torch.autograd.grad(found.sum(), [values[node] for node in calls])
        records = []
        for index, node, gradient in zip(layers, calls, gradients):
            activation, is_rectified = trace.activations[index]
            a, h = given[node], values[activation].detach()
            active = (h > 0).to(h.dtype) if is_rectified else torch.ones_like(h)
            if a.ndim == 4:
                a = patches(modules[index], a)
                by_group = (modules[index].groups, -1)
                a, h, active, gradient = (each.flatten(2).unflatten(1, by_group) for each in (a, h, active, gradient))
            records.append(LayerRecord(a, h, active, gradient))
        return Record(records, found.detach(), found.detach())

    @property
    def samples_at_once(self) -> int:
        """How many samples a pass takes that needs no gradients."""
        return max(1, NUMBERS_AT_ONCE // self.trace.largest)

    def recorded_at_once(self, layers: Layers) -> int:
        """How many samples a pass takes that records layers, in NUMBERS_AT_ONCE."""
        numbers = self.trace.total
        for index in layers:
            m, n = self.layers[index].weight.flatten(1).shape
            numbers += (n + 3 * m) * self.trace.positions(index)
        return max(1, NUMBERS_AT_ONCE // numbers)

    @contextmanager
    def _constant(self) -> Iterator[None]:
        """Keeps its weights out of the autograd graph."""
        free = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            self.requires_grad_(False)
            yield
        finally:
            for parameter in free:
                parameter.requires_grad_(True)


def log_odds(logits: Tensor, labels: Tensor, left_out: Sequence[int] = ()) -> Tensor:
    """log(p / (1 - p)) of every label, p the softmax of the logits (samples, classes), (samples).

    left_out: classes without which the samples of others are seen, their softmax restricted to the rest
    """
    others = logits.scatter(1, labels[:, None], float("-inf"))
    if len(left_out):
        is_left_out = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_left_out[list(left_out)] = True
        others = others.masked_fill(is_left_out & ~is_left_out[labels][:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution is given, with its padding."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode)


def mean_patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The mean of `patches` over positions, (samples, numbers of a kernel): of rows, then of columns."""
    x = padded(layer, x)
    for dim, size, step, apart in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation):
        reach = x.shape[dim] - apart * (size - 1)
        read = [torch.arange(first, first + reach, step) for first in range(0, apart * size, apart)]
        x = torch.stack([x.index_select(dim, each.to(x.device)).mean(dim) for each in read], dim)
    return x.flatten(1)


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the kernels of a convolution read, (samples, numbers of a kernel, positions)."""
    found = F.unfold(padded(layer, x), layer.kernel_size, layer.dilation, 0, layer.stride)
    return found.mT.contiguous().mT  # in memory position after position, as products over samples and positions want it


def with_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives with another weight."""
    if isinstance(layer, nn.Linear):
        z = (x @ weight[None].mT)[0]  # as one of a batch of products is rounded
        return z if layer.bias is None else z + layer.bias
    return layer._conv_forward(x, weight, layer.bias)
