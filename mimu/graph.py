"""The weight graph of a classifier, GraphSAGE on it in closed form, and the masking GCN."""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mimu.masks import LayerMask, Mask
from mimu.tracing import HookedClassifier


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
    number of a kernel. The graph is dense (all weights of a neuron are a clique), but a sum over neighbours needs no
    edge: with `t[u]` the total of x over the masked weights at neuron u, the weight from c to r has

        sum over neighbours = t[c] + t[r] - 2 x[r, c]        degree = count[c] + count[r] - 2

    Two weights are neighbours once for each neuron that they share: those of one kernel twice.
    Vertices stand in the order of the layers, row-major within one: `offset + r * n + c`, where a kernel is a part of a
    row: (m, channels, height, width) is a matrix (m, n), its columns that of a channel one after the other. A grouped
    convolution is several such matrices, (groups, m / groups, n): each row reads the columns of its own group alone.

    sources, targets: the neurons of each layer's columns and rows (`networks.neurons.Ends`)
    names: of the layers' weights, by which masks are made
    """

    def __init__(self, classifier: HookedClassifier, mask_layer: int | Sequence[int] | None) -> None:
        shapes, ends = classifier.shapes, classifier.trace.ends
        self.layers = resolve_mask_layer(mask_layer, len(shapes))
        self.names = [classifier.names[index] for index in self.layers]
        self.shapes = [shapes[index] for index in self.layers]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.num_vertices = sum(self.sizes)
        chosen: list[Tensor] = []
        for index in self.layers:
            chosen += ends[index]
        numbers = torch.cat(chosen).unique(return_inverse=True)[1].split([len(neurons) for neurons in chosen])
        self.sources, self.targets = numbers[::2], numbers[1::2]  # (groups * n) and (m) of each layer
        self.groups = [len(source) // math.prod(shape[1:]) for source, shape in zip(self.sources, self.shapes)]
        self.num_neurons = 1 + max(int(neurons.max()) for neurons in numbers)
        counts = torch.zeros(self.num_neurons, dtype=torch.long)
        for source, target, groups in zip(self.sources, self.targets, self.groups):
            counts.index_add_(0, source, torch.full_like(source, len(target) // groups))
            counts.index_add_(0, target, torch.full_like(target, len(source) // groups))
        # One number where all weights of a layer have the same, else (groups, m / groups, n).
        self.degrees: list[int | Tensor] = []
        for source, target, groups in zip(self.sources, self.targets, self.groups):
            degree = counts[source].view(groups, 1, -1) + counts[target].view(groups, -1, 1) - 2
            self.degrees.append(degree if (degree != degree[0, 0, 0]).any() else int(degree[0, 0, 0]))
        self.num_edges = int((counts * (counts - 1)).sum())

    def split(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """Cuts the vertex dimension into the masked layers: (..., vertices, ...) to (..., *shape, ...) of each."""
        return [part.unflatten(dim, shape) for part, shape in zip(x.split(self.sizes, dim), self.shapes)]

    def matrices(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """The same as matrices, (..., groups, m / groups, n, ...)."""
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
    def of(x: Tensor) -> AffineFeatures:
        return AffineFeatures(x, x.sum(2), x.sum(3))

    def formed(self) -> Tensor:
        """y, (batch, groups, m, n, features)."""
        if self.matrix is None:
            return self.x
        return self.x @ self.matrix + self.source[:, :, None] + self.target[..., None, :]

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of y at each source neuron, (batch, groups, n, features), and target neuron, (batch, groups, m, features)."""
        if self.matrix is None:
            return self.source_sums, self.target_sums
        m, n = self.x.shape[2:4]
        of_source = self.source_sums @ self.matrix + m * self.source + self.target.sum(2, keepdim=True)
        of_target = self.target_sums @ self.matrix + n * self.target + self.source.sum(2, keepdim=True)
        return of_source, of_target

    def transformed(self, matrix: Tensor, source: Tensor, target: Tensor) -> AffineFeatures:
        """y[r, c] M' + source'[c] + target'[r], with an M' (features, out)."""
        if self.matrix is not None:
            source = self.source @ matrix + source
            target = self.target @ matrix + target
            matrix = self.matrix @ matrix
        return replace(self, matrix=matrix, source=source, target=target)

    def relu(self) -> Tensor:
        """relu(y), (batch, groups, m, n, features)."""
        if self.matrix is None:
            return self.x.relu()
        return AffineReLU.apply(self.x, self.matrix, self.source, self.target)


class WeightGraphSAGE(nn.Module):
    """GraphSAGE with mean aggregation on the weight graph (Hamilton et al. 2017, arXiv:1706.02216), in closed form.

        x'[v] = W_r x[v] + W_l mean(x[u], u adjacent to v)

    `lin_l` (neighbours) and `lin_r` (self) are named as in PyG's SAGEConv: a state dict loads into both. With the
    neighbour sum of `WeightGraph` and the degree d, which is constant within most layers,

        x'[r, c] = (W_r - 2/d W_l) x[r, c] + W_l t[c] / d + W_l t[r] / d
    """

    def __init__(self, in_features: int, out_features: int, device: str = "cpu") -> None:
        super().__init__()
        self.lin_l = nn.Linear(in_features, out_features, bias=False, device=device)
        self.lin_r = nn.Linear(in_features, out_features, bias=False, device=device)

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        totals: Tensor | None = None  # t, (batch, neurons, features)
        for source, target, part in zip(graph.sources, graph.targets, features):
            for neurons, total in zip((source, target), part.totals()):
                totals = total.new_zeros(len(total), graph.num_neurons, total.shape[3]) if totals is None else totals
                totals = totals.index_add(1, neurons.to(total.device), total.flatten(1, 2))
        results = []
        for source, target, degree, part in zip(graph.sources, graph.targets, graph.degrees, features):
            both = (totals[:, neurons.to(totals.device)] for neurons in (source, target))
            of_source, of_target = (total.unflatten(1, (part.x.shape[1], -1)) for total in both)
            if isinstance(degree, Tensor):
                results.append(self._with_degrees(part, of_source, of_target, degree.to(totals)))
                continue
            # A weight without neighbours has the mean 0, whatever the divisor.
            neighbours = self.lin_l.weight.T / max(degree, 1)
            matrix = torch.sub(self.lin_r.weight.T, neighbours, alpha=2)
            results.append(part.transformed(matrix, of_source @ neighbours, of_target @ neighbours))
        return results

    def _with_degrees(self, x: AffineFeatures, of_source: Tensor, of_target: Tensor, degree: Tensor) -> AffineFeatures:
        """What a layer becomes whose weights have degrees (groups, m, n) of their own, vertex by vertex."""
        y = x.formed()
        mean = (of_source[:, :, None] + of_target[..., None, :] - 2 * y) / degree.clamp_min(1)[..., None]
        return AffineFeatures.of(self.lin_r(y) + self.lin_l(mean))


class VertexLinear(nn.Linear):
    """What is left of a GraphSAGE round without its neighbours: x'[v] = W x[v]."""

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        matrix, results = self.weight.T, []
        for part in features:
            batch, groups, m, n, _ = part.x.shape
            of_source = matrix.new_zeros(batch, groups, n, self.out_features)
            of_target = matrix.new_zeros(batch, groups, m, self.out_features)
            results.append(part.transformed(matrix, of_source, of_target))
        return results


LARGEST_CHANGE = 1.0  # of the logarithm of a factor: a short or unfortunate training stays near the formula


class MaskingGCN(nn.Module):
    """Says how much the two terms of the saliency count at each weight: GraphSAGE rounds, then a linear read-out.

    Two positive factors for every weight, of what forgetting asks for and of what the others are to keep
    (`masking.rankings.saliency`): how they are shared out over a graph, which leaves the balance of the terms. All is
    without bias, and before its training every factor is 1.
    Without `message_passing`, the control, they follow from the weight's own features alone.
    Shapes: vertex features (batch, vertices, features) to factors (batch, vertices, 2).
    """

    def __init__(
        self, num_features: int, hidden: int = 32, rounds: int = 3, message_passing: bool = True, device: str = "cpu"
    ) -> None:
        super().__init__()
        conv = WeightGraphSAGE if message_passing else partial(VertexLinear, bias=False)
        self.num_features = num_features
        sizes = [num_features] + [hidden] * rounds
        self.convs = nn.ModuleList(conv(n, m, device=device) for n, m in zip(sizes, sizes[1:]))
        self.readout = nn.Linear(hidden, 2, bias=False, device=device)
        nn.init.zeros_(self.readout.weight)

    def forward(self, x: Tensor, graph: WeightGraph) -> Tensor:
        found = torch.cat([self.readout(part).flatten(1, 3) for part in self.hidden(x, graph)], 1)
        found = found - found.mean(1, keepdim=True)
        return (LARGEST_CHANGE * (found / LARGEST_CHANGE).tanh()).exp()

    def hidden(self, x: Tensor, graph: WeightGraph) -> list[Tensor]:
        """What the rounds make of vertex features, of every masked layer (batch, groups, m / groups, n, hidden)."""
        features = [AffineFeatures.of(part) for part in graph.matrices(x, dim=1)]
        for conv in self.convs[:2]:  # the first round only gathers: without a ReLU behind it, it costs next to nothing
            features = conv(features, graph)
        found = [part.relu() for part in features]
        for conv in self.convs[2:]:
            features = conv([AffineFeatures.of(part) for part in found], graph)
            found = [part.relu() for part in features]
        return found


class AffineReLU(torch.autograd.Function):
    """relu(x[r, c] M + source[c] + target[r]): the only work of the GCN that touches every vertex.

    Graph by graph, so that its tensors stay in the cache; and without the copies of autograd's own formulas. Where
    nothing of a graph is above 0, the gradient passes as if all were: a GCN without biases that died would stay dead.
    """

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
        output = x.new_empty(*x.shape[:4], matrix.shape[1])
        for x_of, source_of, target_of, y in zip(x, source, target, output):
            torch.add(source_of[:, None], target_of[:, :, None], out=y)
            y.flatten(0, 2).addmm_(x_of.flatten(0, 2), matrix).relu_()
        context.save_for_backward(x, matrix, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, matrix, output = context.saved_tensors
        of_x = x.new_empty(x.shape) if context.needs_input_grad[0] else None
        of_matrix = torch.zeros_like(matrix)
        of_source, of_target = [], []
        for index, (x_of, y) in enumerate(zip(x, output)):
            of_y = torch.ops.aten.threshold_backward(gradient[index], y, 0) if y.any() else gradient[index]
            flat = of_y.flatten(0, 2)
            # A gradient x^T g is formed twice as fast as g^T x.
            of_matrix.addmm_(x_of.flatten(0, 2).T, flat)
            of_source.append(of_y.sum(1))
            of_target.append(of_y.sum(2))
            if of_x is not None:
                torch.mm(flat, matrix.T, out=of_x[index].flatten(0, 2))
        return of_x, of_matrix, torch.stack(of_source), torch.stack(of_target)


def keep_freed_memory() -> None:
    """Lets glibc, where it is the C library, keep freed memory for large tensors, whose new pages would take time."""
    with suppress(AttributeError, OSError, TypeError):  # of another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no tensor gets pages of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no limit
