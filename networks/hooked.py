"""Networks that can be looked into: run node by node, begun midway, recorded, and run with other weights."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from mimu.networks.neurons import name_of
from mimu.networks.tracing import Trace, call

Layers = Sequence[int]  # by their indices among the weight layers
NUMBERS_AT_ONCE = 2**26  # of float32 in the tensors of a pass over samples, which then takes some 256 MB


class LayerRecord(NamedTuple):
    """What one layer did on a batch.

    The gradient of sample s's log-odds by the weight is `log_odds_gradient[s] inputs[s]^T`. Of a convolution every
    tensor has a last dimension more, its positions, over which that product sums.
    """

    inputs: Tensor  # (samples, n), the input activation a; of a convolution what its kernels read, n numbers each
    outputs: Tensor  # (samples, m), the output activation h: after the ReLU, or the logits for the output layer
    active: Tensor  # (samples, m), 1 where the unit passes a signal on; a unit without ReLU always does
    log_odds_gradient: Tensor  # (samples, m), gradient of the label's log-odds at the pre-activation

    def each(self, change: Callable[[Tensor], Tensor]) -> LayerRecord:
        """The same with every tensor changed."""
        return LayerRecord(*map(change, self))


class Record(NamedTuple):
    """What some layers did on a batch, and the log-odds log(p / (1 - p)) of the label of every sample.

    All losses follow from the log-odds: -log p has the derivative p - 1 by them, -log(1 - p) has p.
    """

    layers: list[LayerRecord]
    log_odds: Tensor  # (samples)
    kept_log_odds: Tensor  # (samples), what they are to stay: as they are, if none has said otherwise


def is_finite(model: nn.Module) -> bool:
    """Whether all its weights are finite numbers."""
    return all(weight.isfinite().all() for weight in model.state_dict().values())


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class HookedClassifier(nn.Module):
    """A network that is run operation by operation, so that it can be looked into.

    names: of the weights that can be masked, as `network.named_parameters` has them; layers are indices among them
    Shapes: images (batch, ...), as the network takes them, to logits (batch, classes).
    """

    def __init__(self, network: nn.Module, example: Tensor | Trace, bfloat16: bool = False) -> None:
        """example: some images, on which the network is traced, or the trace of another of the same architecture.

        bfloat16: whether it runs in mixed precision in training mode, where the processor has bfloat16

        Raises ValueError where it cannot be.
        """
        super().__init__()
        self.network = network
        self.eval()
        self.trace = example if isinstance(example, Trace) else Trace(network, example)
        self.names = [*self.trace.layers]
        self.bfloat16 = bfloat16
        self._is_begun = False

    @property
    def weights(self) -> list[Tensor]:
        """Those of the layers, as they are under a mask."""
        return [operator.attrgetter(name)(self.network) for name in self.names]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight, in the order of the layers: (out, in), or that of kernels."""
        return [layer.shape for layer in self.trace.layers.values()]

    def begun_before(self, layers: Layers) -> HookedClassifier:
        """The same network, which is given `prefix_activations` of the layers in the place of images."""
        return self._begun(self.trace.begun_before([self.names[layer] for layer in layers]))

    def begun_behind(self, layer: int) -> HookedClassifier:
        """The same network, whose `outputs` are given what `recorded` gives of a layer in the place of images."""
        return self._begun(self.trace.begun_behind(self.names[layer]))

    def _begun(self, trace: Trace) -> HookedClassifier:
        begun = copy.copy(self)
        begun.trace, begun._is_begun = trace, True
        return begun

    @torch.no_grad()
    def recorded(self, layer: int, images: Tensor, directions: Tensor) -> tuple[list[Tensor], Tensor]:
        """What stands for images behind a layer, what the layer gives first, and how much of directions it reads.

        Shapes: directions (rank, ...) as the weight, to (batch, rank, ...); of a linear layer (batch, ..., rank)
        Raises ValueError where `Trace.begun_behind` does.
        """
        node, watched = self.trace.layers[self.names[layer]].node, self.trace.begun_behind(self.names[layer]).given
        parts = []
        for part in images.split(self.samples_at_once):
            values = self.trace.run(self.network, part, watched=[*watched, node.args[0]], end=node)
            read = node.target(values[node.args[0]], directions, None, *node.args[3:])
            parts.append([*(values[each] for each in watched), read])
        *values, read = map(torch.cat, zip(*parts))
        return values, read

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        run = (lambda x: self.outputs(x)[1]) if self._is_begun else self.network
        if self.training and self.bfloat16 and has_bfloat16(images.device):
            with torch.autocast(images.device.type, torch.bfloat16):
                return run(images).float()
        return run(images) if torch.is_grad_enabled() else torch.cat([*map(run, images.split(self.samples_at_once))])

    def outputs(
        self, images: Tensor | Sequence[Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The representation, which the last layer is given, (batch, n), and the logits (batch, classes).

        In evaluation mode. images: or `recorded` values
        weights: by name, in the place of its own; gradients then reach these and no parameter
        """
        trace = self.trace
        changed = {trace.layers[name].node: weight for name, weight in (weights or {}).items()}

        def compute(node: fx.Node, arguments: tuple, named: dict) -> Any:
            if node not in changed:
                return call(node, arguments, named)
            x, _, *others = arguments
            if name_of(node) == "linear" and x.ndim == 2:
                z = (x @ changed[node][None].mT)[0]  # as one of a batch of products is rounded
                return z + others[0] if others and others[0] is not None else z
            return node.target(x, changed[node], *others)

        watched, is_constant = [trace.representation], bool(changed)
        values = trace.run(self.network, images, compute, watched, is_constant=is_constant)
        return values[trace.representation], values[trace.output]

    @torch.no_grad()
    def value_of(self, node: fx.Node, images: Tensor) -> Tensor:
        """What a node of the trace gives, (batch, ...)."""
        parts = images.split(self.samples_at_once)
        return torch.cat([self.trace.run(self.network, part, end=node)[node] for part in parts])

    def prefix_activations(self, layers: Layers, images: Tensor) -> Tensor:
        """What stands for images where the network can begin before the layers, (batch, ...)."""
        return self.value_of(self.trace.start_of([self.names[layer] for layer in layers]), images)

    @torch.no_grad()
    def layer_inputs(self, index: int, images: Tensor) -> Iterator[Tensor]:
        """What the weight of a layer is multiplied with, some samples at a time, (samples, positions, groups * n)."""
        layer = self.trace.layers[self.names[index]]
        given = layer.node.args[0]
        for part in images.split(self.recorded_at_once([index])):
            x = layer.read(self.trace.run(self.network, part, end=given)[given])
            yield x[:, None] if layer.positions is None else x.flatten(1, 2).mT

    @torch.no_grad()
    def mean_inputs(self, index: int, images: Tensor) -> Tensor:
        """The same, its mean over positions (samples, groups * n)."""
        layer = self.trace.layers[self.names[index]]
        given, parts = layer.node.args[0], images.split(self.samples_at_once)
        return torch.cat([layer.mean_read(self.trace.run(self.network, x, end=given)[given]) for x in parts])

    @torch.enable_grad()
    def record(self, images: Tensor, labels: Tensor, layers: Layers, left_out: Sequence[int] = ()) -> Record:
        """What `layers` do on a batch: a forward pass, and a backward one as far as their pre-activations.

        labels: (samples); left_out: as `log_odds` takes it
        """
        trace = self.trace
        recorded = [trace.layers[self.names[index]] for index in layers]
        calls = {layer.node for layer in recorded}
        given: dict[fx.Node, Tensor] = {}

        def compute(node: fx.Node, arguments: tuple, named: dict) -> Any:
            value = call(node, arguments, named)
            if node in calls:
                given[node] = arguments[0].detach()
                # The autograd graph begins at the first of them.
                value = value if value.requires_grad else value.detach().requires_grad_()
            return value

        watched = [*calls, *(layer.activation for layer in recorded)]
        values = trace.run(self.network, images.detach(), compute, watched, is_constant=True)
        found = log_odds(values[trace.output], labels, left_out)
        gradients = torch.autograd.grad(found.sum(), [values[layer.node] for layer in recorded], materialize_grads=True)
        records = []
        for layer, gradient in zip(recorded, gradients):
            h = values[layer.activation].detach()
            active = (h > 0).to(h.dtype) if layer.is_rectified else torch.ones_like(h)
            h, active, gradient = map(layer.by_position, (h, active, gradient))
            records.append(LayerRecord(layer.read(given[layer.node]), h, active, gradient))
        return Record(records, found.detach(), found.detach())

    def positions(self, index: int) -> int | None:
        """At how many places of a sample a layer's weight stands; None of a linear layer of features alone."""
        return self.trace.layers[self.names[index]].positions

    @property
    def samples_at_once(self) -> int:
        """How many samples a pass takes that needs no gradients."""
        # A sixteenth of what fits: it stays in the caches of a processor, for half the time.
        return max(1, NUMBERS_AT_ONCE // (16 * self.trace.largest))

    def recorded_at_once(self, layers: Layers) -> int:
        """How many samples a pass takes that records layers, in NUMBERS_AT_ONCE."""
        recorded = sum(self.trace.layers[self.names[index]].numbers for index in layers)
        return max(1, NUMBERS_AT_ONCE // (self.trace.total + recorded))


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
