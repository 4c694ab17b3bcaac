"""A classifier that runs operation by operation: under other weights, from midway, and recorded."""

import copy
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mimu.layers import Layer, Record
from mimu.operations import name_of
from mimu.tracing import Trace, call
from mimu.wrapping import Wrapper, logits_of

NUMBERS_AT_ONCE = 2**26  # of float32 in the tensors of a pass over samples, which then takes some 256 MB


def samples_that_fit(numbers: int) -> int:
    """The number of samples, of so many numbers each, that one pass may take; at least 1."""
    return max(1, NUMBERS_AT_ONCE // numbers) if numbers else sys.maxsize


def has_bfloat16(device: torch.device) -> bool:
    """True if a device computes in bfloat16 by itself."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


class HookedClassifier(Wrapper):
    """A network that runs operation by operation, so that every layer's values can be read.

    Shapes: images (batch, ...), as the network takes them, to logits (batch, classes).

    Attributes:
        names: the weights of the layers that can be masked, as in `network.named_parameters`
        merged: classes that `outputs` and `record` take for one: the first has the logsumexp of their logits
    """

    merged: Sequence[int] = ()

    def __init__(self, network: nn.Module, example: Tensor | Trace, bfloat16: bool = False) -> None:
        """Traces a network.

        Args:
            example: some images, or the trace of another network of the same architecture
            bfloat16: whether to run in mixed precision in training mode, if the processor has bfloat16
        Raises:
            ValueError: if the network cannot be traced
        """
        super().__init__()
        self.network = network
        self.eval()
        self.trace = example if isinstance(example, Trace) else Trace(network, example)
        self.names = [*self.trace.layers]
        self.bfloat16 = bfloat16
        self._is_suffix = False

    @property
    def layers(self) -> list[Layer]:
        """The layers that can be masked. Elsewhere a layer is its index in this list."""
        return [*self.trace.layers.values()]

    @property
    def weights(self) -> list[Tensor]:
        """The layers' weights, as they are under a mask."""
        return [operator.attrgetter(name)(self.network) for name in self.names]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight, in the order of the layers: (out, in), or that of kernels."""
        return [layer.shape for layer in self.layers]

    def suffix_from(self, layers: Sequence[int]) -> "HookedClassifier":
        """This network, which takes `prefix_activations` of the layers in place of images."""
        return self._with(trace=self.trace.suffix_from([self.names[layer] for layer in layers]), _is_suffix=True)

    def suffix_after(self, layer: int) -> "HookedClassifier":
        """This network, whose `outputs` take what `recorded` returns for a layer in place of images."""
        return self._with(trace=self.trace.suffix_after(self.names[layer]), _is_suffix=True)

    def merging(self, classes: Sequence[int]) -> "HookedClassifier":
        """This network, with some classes `merged`."""
        return self._with(merged=classes)

    def _with(self, **attributes: Any) -> "HookedClassifier":
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def _merged(self, logits: Tensor) -> Tensor:
        if len(self.merged) < 2:
            return logits
        merged = torch.tensor(self.merged, device=logits.device)
        together = logits[:, merged].logsumexp(1, keepdim=True)
        return logits.index_fill(1, merged, float("-inf")).index_copy(1, merged[:1], together)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        run = (lambda x: self.outputs(x)[1]) if self._is_suffix else (lambda x: logits_of(self.network(x)))
        if self.training and self.bfloat16 and has_bfloat16(images.device):
            with torch.autocast(images.device.type, torch.bfloat16):
                return run(images).float()
        return run(images) if torch.is_grad_enabled() else torch.cat([*map(run, images.split(self.samples_at_once))])

    def outputs(self, images: Tensor | Sequence[Tensor], weights: Mapping[str, Tensor] = {}) -> tuple[Tensor, Tensor]:
        """The representation (batch, n), which is the last layer's input, and the logits, in evaluation mode.

        Args:
            images: or the values that `recorded` returns
            weights: replace the network's own, by name; gradients then reach these and no parameter
        """
        trace = self.trace
        replaced = {trace.layers[name].node for name in weights}

        def compute(node: fx.Node, arguments: tuple, keywords: dict) -> Any:
            if node not in replaced or name_of(node) != "linear" or arguments[0].ndim != 2:
                return call(node, arguments, keywords)
            x, weight, *bias = arguments
            z = (x @ weight[None].mT)[0]  # rounds as one of a batch of products does
            return z if bias in ([], [None]) else z + bias[0]

        values = trace.run(self.network, images, compute, [trace.representation], weights=weights or None)
        return values[trace.representation], self._merged(values[trace.output])

    def _values(self, node: fx.Node, images: Tensor) -> Iterator[Tensor]:
        """The values of a node, some samples at a time."""
        for part in images.split(self.samples_at_once):
            yield self.trace.run(self.network, part, end=node)[node]

    @torch.no_grad()
    def value_of(self, node: fx.Node, images: Tensor) -> Tensor:
        """The value of a node of the trace, (batch, ...)."""
        return torch.cat([*self._values(node, images)])

    def prefix_activations(self, layers: Sequence[int], images: Tensor) -> Tensor:
        """The values that `suffix_from` takes in place of images, (batch, ...)."""
        return self.value_of(self.trace.start_of([self.names[layer] for layer in layers]), images)

    @torch.no_grad()
    def mean_inputs(self, index: int, images: Tensor) -> Tensor:
        """The input of a layer, averaged over positions, (samples, groups * n)."""
        layer = self.layers[index]
        return torch.cat([*map(layer.mean_read, self._values(layer.node.args[0], images))])

    @torch.no_grad()
    def recorded(self, layer: int, images: Tensor, directions: Tensor) -> tuple[list[Tensor], Tensor]:
        """The values that `suffix_after` takes in place of images, the layer's output first, and a projection.

        Args:
            directions: (rank, ...), shaped as the weight
        Returns: the values, and the layer's output if its weight were `directions`: (batch, rank, ...), or
            (batch, ..., rank) for a linear layer
        Raises:
            ValueError: as `Trace.suffix_after` does
        """
        node = self.layers[layer].node
        inputs = self.trace.suffix_after(self.names[layer]).input_nodes
        parts = []
        for part in images.split(self.samples_at_once):
            values = self.trace.run(self.network, part, watched=[*inputs, node.args[0]], end=node)
            projection = node.target(values[node.args[0]], directions, None, *node.args[3:])
            parts.append([*(values[each] for each in inputs), projection])
        *cached_inputs, projections = map(torch.cat, zip(*parts))
        return cached_inputs, projections

    @torch.enable_grad()
    def record(
        self,
        images: Tensor,
        labels: Tensor,
        layers: Sequence[int],
        excluded: Sequence[int] = (),
        weights: Mapping[str, Tensor] = {},
    ) -> Record:
        """Records what layers do on a batch, by a forward pass and a backward one as far as the layers.

        Args:
            labels: (samples)
            excluded: as for `log_odds`
            weights: replace the network's own, by name
        """
        trace = self.trace
        recorded = [self.layers[index] for index in layers]
        calls = {layer.node for layer in recorded}
        inputs: dict[fx.Node, Tensor] = {}

        def compute(node: fx.Node, arguments: tuple, keywords: dict) -> Any:
            value = call(node, arguments, keywords)
            if node in calls:
                inputs[node] = arguments[0].detach()
                # The autograd graph begins at the first of them.
                value = value if value.requires_grad else value.detach().requires_grad_()
            return value

        watched = [*calls, *(layer.activation for layer in recorded)]
        values = trace.run(self.network, images.detach(), compute, watched, weights=weights)
        odds = log_odds(self._merged(values[trace.output]), labels, excluded)
        gradients = torch.autograd.grad(odds.sum(), [values[layer.node] for layer in recorded], materialize_grads=True)
        records = []
        with torch.no_grad():
            for layer, gradient in zip(recorded, gradients):
                records.append(layer.record(inputs[layer.node], values[layer.activation].detach(), gradient))
        return Record(records, odds.detach(), odds.detach())

    @property
    def samples_at_once(self) -> int:
        """The number of samples in a pass that needs no gradients."""
        # A sixteenth of what fits stays in the caches of a processor, and takes half the time.
        return samples_that_fit(16 * self.trace.largest)

    def recorded_at_once(self, layers: Sequence[int]) -> int:
        """The number of samples in a pass that records layers."""
        return samples_that_fit(self.trace.total + sum(self.layers[index].numbers for index in layers))


def log_odds(logits: Tensor, labels: Tensor, excluded: Sequence[int] = ()) -> Tensor:
    """The log-odds log(p / (1 - p)) of every label, (samples), p the softmax of the logits (samples, classes).

    Args:
        excluded: classes that are left out of the softmax of samples of the remaining classes
    """
    remaining = logits.scatter(1, labels[:, None], float("-inf"))
    if len(excluded):
        is_excluded = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_excluded[list(excluded)] = True
        remaining = remaining.masked_fill(is_excluded & ~is_excluded[labels][:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - remaining.logsumexp(1)
