"""The weight graph of a classifier, GraphSAGE on it in closed form, and the masking GCN."""

import ctypes
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mimu.layers import Layer
from mimu.masks import LayerMask, Mask


def resolve_mask_layer(mask_layer: int | Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Sorted indices, from 0, of the masked layers: one, several or, by None, all. Raises ValueError on any other."""
    if mask_layer is None:
        return tuple(range(num_layers))
    indices = [mask_layer] if isinstance(mask_layer, int) else mask_layer
    layers = sorted({index % num_layers for index in indices if -num_layers <= index < num_layers})
    if not layers or len(layers) < len(indices):
        valid = f"{-num_layers} to {num_layers - 1}"
        raise ValueError(f"mask_layer must be null, or one or several of {valid}, each once, not {mask_layer}")
    return tuple(layers)


class WeightGraph:
    """One vertex per weight of the masked layers; two are adjacent when their weights share a neuron.

    This is the line graph of the network. A neuron is a unit of a linear layer, or a channel, and a vertex then one
    number of a kernel. Layers that follow one another share the neurons between them (`joined_neurons`); the graphs of
    other layers stand side by side.

    The graph is dense (all weights of a neuron are a clique), but a sum over neighbours needs no edge: with `t[u]` the
    total of x over the masked weights at neuron u, the weight from c to r has

        sum over neighbours = t[c] + t[r] - 2 x[r, c]        degree = count[c] + count[r] - 2

    The degree is the same for all weights of a layer. Two weights are neighbours once for each neuron that they share:
    those of one kernel twice.

    Vertices stand in the order of the layers, row-major within one: `offset + r * n + c`, where a kernel is a part of a
    row: (m, channels, height, width) is a matrix (m, n), its columns those of a channel one after the other. A grouped
    convolution is several such matrices, (groups, m / groups, n): each row reads the columns of its own group alone.

    Attributes:
        layers: indices of the masked layers
        names: of their weights, by which masks are made
        sources: the neuron of each column of each layer, (groups * n)
        targets: the neuron of each row of each layer, (m)
        degrees: of the weights of each layer
    """

    def __init__(self, trace_layers: Mapping[str, Layer], mask_layer: int | Sequence[int] | None) -> None:
        """Builds the graph of some of the layers that a network's trace can mask, by name."""
        self.layers = resolve_mask_layer(mask_layer, len(trace_layers))
        self.names = [[*trace_layers][index] for index in self.layers]
        layers = [trace_layers[name] for name in self.names]
        self.shapes = [layer.shape for layer in layers]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.num_vertices = sum(self.sizes)
        self.groups = [layer.groups for layer in layers]
        neurons: list[Tensor] = []
        for layer in layers:
            columns = layer.groups * math.prod(layer.shape[1:])
            sources, targets = (torch.arange(each.start, each.stop) for each in (layer.sources, layer.targets))
            neurons += [sources.repeat_interleave(columns // len(sources)), targets]
        numbers = torch.cat(neurons).unique(return_inverse=True)[1].split([*map(len, neurons)])
        self.sources, self.targets = numbers[::2], numbers[1::2]
        self.num_neurons = 1 + max(int(each.max()) for each in numbers)

        counts = torch.zeros(self.num_neurons, dtype=torch.long)  # masked weights at each neuron
        for source, target, groups in zip(self.sources, self.targets, self.groups):
            counts.index_add_(0, source, torch.full_like(source, len(target) // groups))
            counts.index_add_(0, target, torch.full_like(target, len(source) // groups))
        self.degrees = [int(counts[s[0]] + counts[t[0]]) - 2 for s, t in zip(self.sources, self.targets)]
        self.num_edges = int((counts * (counts - 1)).sum())

    def split(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """Cuts the vertex dimension into the masked layers: (..., vertices, ...) to (..., *shape, ...) of each."""
        return [part.unflatten(dim, shape) for part, shape in zip(x.split(self.sizes, dim), self.shapes)]

    def matrices(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """Cuts the vertex dimension into the layers' matrices, (..., groups, m / groups, n, ...) each."""
        parts = zip(x.split(self.sizes, dim), self.shapes, self.groups)
        return [part.unflatten(dim, (groups, shape[0] // groups, -1)) for part, shape, groups in parts]

    def zeroing(self, vertices: Tensor) -> Mask:
        """The mask that switches off the given vertices (kappa) and keeps all others."""
        keep = torch.ones(self.num_vertices, dtype=torch.float32, device=vertices.device).index_fill(0, vertices, 0)
        return Mask({name: LayerMask.of(part) for name, part in zip(self.names, self.split(keep))})

    def keeping(self, vertices: Tensor) -> Mask:
        """The mask that keeps the given vertices (K) and switches off all others."""
        is_other = torch.ones(self.num_vertices, dtype=torch.bool, device=vertices.device)
        return self.zeroing(is_other.index_fill(0, vertices, False).nonzero()[:, 0])

    def edge_index(self) -> Tensor:
        """Every directed edge, (2, edges), sorted. For export and tests: nothing in training or evaluation needs it."""
        cliques: dict[int, list[Tensor]] = defaultdict(list)
        for source, target, vertices in zip(self.sources, self.targets, self.matrices(torch.arange(self.num_vertices))):
            for neurons, by_neuron in ((source, vertices.mT), (target, vertices)):
                for neuron, members in zip(neurons.tolist(), by_neuron.flatten(0, 1)):
                    cliques[neuron].append(members)
        pairs = torch.cat([torch.combinations(torch.cat(members), 2) for members in cliques.values()])
        edges = torch.cat([pairs, pairs.flip(1)])
        return edges[(edges[:, 0] * self.num_vertices + edges[:, 1]).argsort()].T.contiguous()


@dataclass(frozen=True)
class AffineFeatures:
    """Vertex features of one masked layer in the form y[r, c] = x[r, c] M + source[c] + target[r].

    A linear round on them changes M, source and target alone, all of them small: the features of the vertices are
    formed when a non-linearity needs them.
    """

    x: Tensor  # (batch, groups, m, n, in), m rows of each group
    source_sums: Tensor  # of x over the weights of each source neuron, (batch, groups, n, in)
    target_sums: Tensor  # of x over the weights of each target neuron, (batch, groups, m, in)
    matrix: Tensor | None = None  # M, (in, features); without it y is x
    source: Tensor | None = None  # (batch, groups, n, features)
    target: Tensor | None = None  # (batch, groups, m, features)

    @staticmethod
    def of(x: Tensor) -> "AffineFeatures":
        return AffineFeatures(x, x.sum(2), x.sum(3))

    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums of y at source neurons (batch, groups, n, features) and target neurons (batch, groups, m, ...)."""
        if self.matrix is None:
            return self.source_sums, self.target_sums
        m, n = self.x.shape[2:4]
        at_sources = self.source_sums @ self.matrix + m * self.source + self.target.sum(2, keepdim=True)
        at_targets = self.target_sums @ self.matrix + n * self.target + self.source.sum(2, keepdim=True)
        return at_sources, at_targets

    def transformed(self, matrix: Tensor, source: Tensor, target: Tensor) -> "AffineFeatures":
        """y[r, c] M' + source'[c] + target'[r], with an M' (features, out)."""
        if self.matrix is not None:
            source = self.source @ matrix + source
            target = self.target @ matrix + target
            matrix = self.matrix @ matrix
        return replace(self, matrix=matrix, source=source, target=target)

    def relu(self) -> Tensor:
        """relu(y) after at least one round, (batch, groups, m, n, features)."""
        return AffineReLU.apply(self.x, self.matrix, self.source, self.target)


class WeightGraphSAGE(nn.Module):
    """GraphSAGE with mean aggregation on the weight graph (Hamilton et al. 2017, arXiv:1706.02216), in closed form.

        x'[v] = W_r x[v] + W_l mean(x[u], u adjacent to v)

    `lin_l` (neighbours) and `lin_r` (self) are named as in PyG's SAGEConv: a state dict loads into both. With the
    neighbour sum of `WeightGraph` and the degree d of a layer's weights,

        x'[r, c] = (W_r - 2/d W_l) x[r, c] + W_l t[c] / d + W_l t[r] / d
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin_l = nn.Linear(in_features, out_features, bias=False)
        self.lin_r = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        neurons = [each.to(self.lin_l.weight.device) for pair in zip(graph.sources, graph.targets) for each in pair]
        sums = [each for part in features for each in part.totals()]
        totals = sums[0].new_zeros(len(sums[0]), graph.num_neurons, sums[0].shape[3])  # t, (batch, neurons, features)
        for indices, each in zip(neurons, sums):
            totals = totals.index_add(1, indices, each.flatten(1, 2))
        results = []
        for source, target, degree, part in zip(neurons[::2], neurons[1::2], graph.degrees, features):
            at_source, at_target = (totals[:, each].unflatten(1, (part.x.shape[1], -1)) for each in (source, target))
            # The mean over no neighbours is 0, whatever the divisor.
            neighbours = self.lin_l.weight.T / max(degree, 1)
            matrix = torch.sub(self.lin_r.weight.T, neighbours, alpha=2)
            results.append(part.transformed(matrix, at_source @ neighbours, at_target @ neighbours))
        return results


class VertexLinear(nn.Linear):
    """A GraphSAGE round without its neighbours: x'[v] = W x[v]."""

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        results = []
        for part in features:
            sums = part.source_sums, part.target_sums
            source, target = (each.new_zeros(*each.shape[:3], self.out_features) for each in sums)
            results.append(part.transformed(self.weight.T, source, target))
        return results


LARGEST_CHANGE = 1.0  # of the logarithm of a factor: a short or unfortunate training stays near the formula


class MaskingGCN(nn.Module):
    """Rescales the two terms of the saliency at each weight: GraphSAGE rounds, then a linear read-out.

    It computes two positive factors for every weight, one for the forgetting term and one for the retention term
    (`mimu.saliency.saliency`). Their geometric means over a graph are about 1, so that the balance of the terms stays.
    It has no biases, and before its training every factor is 1.

    Args:
        message_passing: if False, the control, the factors follow from the weight's own features alone
    Shapes: vertex features (batch, vertices, features) to factors (batch, vertices, 2).
    """

    def __init__(self, num_features: int, hidden: int = 32, rounds: int = 3, message_passing: bool = True) -> None:
        super().__init__()
        conv = WeightGraphSAGE if message_passing else partial(VertexLinear, bias=False)
        self.num_features = num_features
        sizes = [num_features] + [hidden] * rounds
        self.convs = nn.ModuleList(conv(n, m) for n, m in zip(sizes, sizes[1:]))
        self.readout = nn.Linear(hidden, 2, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(self, x: Tensor, graph: WeightGraph) -> Tensor:
        logarithms = torch.cat([self.readout(part).flatten(1, 3) for part in self.hidden(x, graph)], 1)
        logarithms = logarithms - logarithms.mean(1, keepdim=True)
        return (LARGEST_CHANGE * (logarithms / LARGEST_CHANGE).tanh()).exp()

    def hidden(self, x: Tensor, graph: WeightGraph) -> list[Tensor]:
        """The output of the rounds for every masked layer, (batch, groups, m / groups, n, hidden) each."""
        features = [AffineFeatures.of(part) for part in graph.matrices(x, dim=1)]
        for index, conv in enumerate(self.convs):
            if index > 1:  # no ReLU after the first round, which only gathers: so it costs next to nothing
                features = [AffineFeatures.of(part.relu()) for part in features]
            features = conv(features, graph)
        return [part.relu() for part in features]


class AffineReLU(torch.autograd.Function):
    """relu(x[r, c] M + source[c] + target[r]), the only operation of the GCN that touches every vertex.

    It runs graph by graph, so that its tensors stay in the cache, and without the copies of autograd's own formulas.
    If no output of a graph is above 0, the gradient passes as if all were: a GCN without biases would stay dead.
    """

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
        output = x.new_empty(*x.shape[:4], matrix.shape[1])
        for graph_x, graph_source, graph_target, y in zip(x, source, target, output):
            torch.add(graph_source[:, None], graph_target[:, :, None], out=y)
            y.flatten(0, 2).addmm_(graph_x.flatten(0, 2), matrix).relu_()
        context.save_for_backward(x, matrix, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, matrix, output = context.saved_tensors
        x_gradient = x.new_empty(x.shape) if context.needs_input_grad[0] else None
        matrix_gradient = torch.zeros_like(matrix)
        source_gradients, target_gradients = [], []
        for index, (graph_x, y) in enumerate(zip(x, output)):
            y_gradient = torch.ops.aten.threshold_backward(gradient[index], y, 0) if y.any() else gradient[index]
            flat = y_gradient.flatten(0, 2)
            # x^T g is computed twice as fast as g^T x.
            matrix_gradient.addmm_(graph_x.flatten(0, 2).T, flat)
            source_gradients.append(y_gradient.sum(1))
            target_gradients.append(y_gradient.sum(2))
            if x_gradient is not None:
                torch.mm(flat, matrix.T, out=x_gradient[index].flatten(0, 2))
        return x_gradient, matrix_gradient, torch.stack(source_gradients), torch.stack(target_gradients)


def keep_freed_memory() -> None:
    """Makes glibc, if it is the C library, keep freed memory for large tensors: new pages would take time."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no tensor gets pages of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no limit
