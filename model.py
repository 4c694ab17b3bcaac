"""The graph of a network's weights, the masking GCN, and masks; last, what only makes it fast."""

from __future__ import annotations

import ctypes
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.utils import parametrize

from networks.architectures import mlp
from networks.hooked import HookedClassifier, shape_of, weight_layers
from networks.tracing import Ends
from runs import files


class HookedMNISTClassifier(HookedClassifier):
    """Multilayer perceptron with ReLU between its linear layers.

    Shapes: images (batch, 28, 28) or (batch, 784) to logits (batch, classes).
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        in_features: int = 784,
        num_classes: int = 10,
        bias: bool = False,
    ) -> None:
        super().__init__(mlp([in_features, *hidden_sizes, num_classes], bias), torch.zeros(2, in_features))


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
    row: (m, channels, height, width) is a matrix (m, n), its columns that of a channel one after the other.

    ends: the neurons of every layer's columns and rows (`networks.tracing.Ends`), None of one that no mask can be put
        on
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], mask_layer: int | Sequence[int] | None, ends: Sequence[Ends | None]
    ) -> None:
        self.layers = resolve_mask_layer(mask_layer, len(shapes))
        self.shapes = [tuple(shapes[index]) for index in self.layers]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.num_vertices = sum(self.sizes)
        if odd := [index for index in self.layers if ends[index] is None]:
            raise ValueError(f"mask_layer {odd} must be called once, on samples of features or channels")
        chosen = [neurons for index in self.layers for neurons in ends[index]]
        numbers = torch.cat(chosen).unique(return_inverse=True)[1].split([len(neurons) for neurons in chosen])
        self.sources, self.targets = numbers[::2], numbers[1::2]  # (n) and (m) of each layer
        self.num_neurons = 1 + max(int(neurons.max()) for neurons in numbers)
        counts = torch.zeros(self.num_neurons, dtype=torch.long)
        for source, target in zip(self.sources, self.targets):
            counts.index_add_(0, source, torch.full_like(source, len(target)))
            counts.index_add_(0, target, torch.full_like(target, len(source)))
        # One number where all weights of a layer have the same, else (m, n).
        self.degrees: list[int | Tensor] = []
        for source, target in zip(self.sources, self.targets):
            degree = counts[source] + counts[target][:, None] - 2
            self.degrees.append(degree if (degree != degree[0, 0]).any() else int(degree[0, 0]))
        self.num_edges = int((counts * (counts - 1)).sum())

    @staticmethod
    def of(classifier: HookedClassifier, mask_layer: int | Sequence[int] | None) -> WeightGraph:
        """The graph of some layers of a classifier, with the neurons that they share in it."""
        return WeightGraph(classifier.shapes, mask_layer, classifier.trace.ends)

    def split(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """Cuts the vertex dimension into the masked layers: (..., vertices, ...) to (..., *shape, ...) of each."""
        return [part.unflatten(dim, shape) for part, shape in zip(x.split(self.sizes, dim), self.shapes)]

    def matrices(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """The same as matrices, (..., m, n, ...)."""
        return [part.unflatten(dim, (shape[0], -1)) for part, shape in zip(x.split(self.sizes, dim), self.shapes)]

    def edge_index(self) -> Tensor:
        """Every directed edge, (2, edges), sorted. For export and tests: nothing in training or evaluation needs it."""
        cliques: dict[int, list[Tensor]] = defaultdict(list)
        for source, target, vertices in zip(self.sources, self.targets, self.matrices(torch.arange(self.num_vertices))):
            for neurons, by_neuron in ((source, vertices.T), (target, vertices)):
                for neuron, members in zip(neurons.tolist(), by_neuron):
                    cliques[neuron].append(members)
        pairs = [torch.combinations(torch.cat(members), 2) for members in cliques.values()]
        edges = torch.cat([*pairs, *(pair.flip(1) for pair in pairs)])
        return edges[(edges[:, 0] * self.num_vertices + edges[:, 1]).argsort()].T.contiguous()


class WeightGraphSAGE(nn.Module):
    """GraphSAGE with mean aggregation on the weight graph (Hamilton et al. 2017, arXiv:1706.02216), in closed form.

        x'[v] = W_r x[v] + W_l mean(x[u], u adjacent to v)

    `lin_l` (neighbours) and `lin_r` (self) are named as in PyG's SAGEConv: a state dict loads into both. With the
    neighbour sum of `WeightGraph` and the degree d, which is constant within most layers,

        x'[r, c] = (W_r - 2/d W_l) x[r, c] + W_l t[c] / d + W_l t[r] / d
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin_l = nn.Linear(in_features, out_features, bias=False)
        self.lin_r = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        totals: Tensor | None = None  # t, (batch, neurons, features)
        for source, target, part in zip(graph.sources, graph.targets, features):
            for neurons, total in zip((source, target), part.totals()):
                totals = total.new_zeros(len(total), graph.num_neurons, total.shape[2]) if totals is None else totals
                totals = totals.index_add(1, neurons.to(total.device), total)
        results = []
        for source, target, degree, part in zip(graph.sources, graph.targets, graph.degrees, features):
            of_source, of_target = (totals[:, neurons.to(totals.device)] for neurons in (source, target))
            if isinstance(degree, Tensor):
                results.append(self._with_degrees(part, of_source, of_target, degree.to(totals)))
                continue
            # A weight without neighbours has the mean 0, whatever the divisor.
            neighbours = self.lin_l.weight.T / max(degree, 1)
            matrix = torch.sub(self.lin_r.weight.T, neighbours, alpha=2)
            results.append(part.transformed(matrix, of_source @ neighbours, of_target @ neighbours))
        return results

    def _with_degrees(self, x: AffineFeatures, of_source: Tensor, of_target: Tensor, degree: Tensor) -> AffineFeatures:
        """What a layer becomes whose weights have degrees (m, n) of their own, vertex by vertex."""
        y = x.formed()
        mean = (of_source[:, None] + of_target[:, :, None] - 2 * y) / degree.clamp_min(1)[..., None]
        return AffineFeatures.of(self.lin_r(y) + self.lin_l(mean))


class VertexLinear(nn.Linear):
    """What is left of a GraphSAGE round without its neighbours: x'[v] = W x[v]."""

    def forward(self, features: list[AffineFeatures], graph: WeightGraph) -> list[AffineFeatures]:
        matrix, results = self.weight.T, []
        for part in features:
            sums = (part.source_sums, part.target_sums)
            nothing = (matrix.new_zeros(*of_neurons.shape[:2], self.out_features) for of_neurons in sums)
            results.append(part.transformed(matrix, *nothing))
        return results


LARGEST_CHANGE = 4.0  # of the logarithm of the weight of a term


class MaskingGCN(nn.Module):
    """Scores how much a class depends on each weight: GraphSAGE rounds, then a linear read-out, all without bias.

    Without `message_passing`, the control, every weight is scored by its own features alone.
    One that `weighs` gives no scores but two positive numbers for every weight, by which a formula weighs its terms
    there; before its training they are the same for all.
    Shapes: vertex features (batch, vertices, features) to logits (batch, vertices), or to (batch, vertices, 2).
    """

    def __init__(
        self,
        num_features: int,
        hidden: int = 32,
        rounds: int = 3,
        message_passing: bool = True,
        weighs: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        conv = WeightGraphSAGE if message_passing else partial(VertexLinear, bias=False)
        self.num_features = num_features
        sizes = [num_features] + [hidden] * rounds
        self.convs = nn.ModuleList(conv(n, m) for n, m in zip(sizes, sizes[1:]))
        self.weighs = weighs is not None
        self.readout = nn.Linear(hidden, 2 if self.weighs else 1, bias=False)
        if self.weighs:
            nn.init.zeros_(self.readout.weight)
            self.log_weights = nn.Parameter(torch.tensor(weighs).log())

    def forward(self, x: Tensor, graph: WeightGraph) -> Tensor:
        x = graph.matrices(x, dim=1)
        for index, conv in enumerate(self.convs):
            # The first round only gathers: without a ReLU behind it, it costs next to nothing.
            if index != 1:
                features = [AffineFeatures.of(part) for part in x]
            features = conv(features, graph)
            if index > 0 or len(self.convs) == 1:
                x = [part.relu() for part in features]
        if not self.weighs:
            return torch.cat([(part @ self.readout.weight[0]).flatten(1) for part in x], 1)
        found = torch.cat([self.readout(part).flatten(1, 2) for part in x], 1)
        return (self.log_weights + LARGEST_CHANGE * (found / LARGEST_CHANGE).tanh()).exp()


class WeightMask(nn.Module):
    """The parametrization that multiplies a weight matrix with a fixed 0/1 mask; forgets: as in `Mask`."""

    def __init__(self, keep: Tensor, forgets: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.forgets = forgets

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


def refuse_pickling(layer: nn.Module) -> None:
    raise RuntimeError(
        "a masked model is not saved whole: save model.state_dict(), and the mask by mask.save(path); or write its "
        "zeros into the weights first, by mask.apply(model, permanent=True)"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which weights of the masked layers are kept (1) and which are switched off (0), apart from any classifier."""

    layers: tuple[int, ...]  # indices among the weight layers of a model
    keep: tuple[Tensor, ...]  # (m, n) of each masked layer
    forgets: tuple[int, ...] = ()  # the classes that it was made to forget

    @staticmethod
    def zeroing(graph: WeightGraph, vertices: Tensor) -> Mask:
        """The mask that switches off the given vertices (kappa) of the weight graph and keeps all others."""
        keep = torch.ones(graph.num_vertices, device=vertices.device).index_fill(0, vertices, 0)
        return Mask(graph.layers, tuple(graph.split(keep)))

    @staticmethod
    def keeping(graph: WeightGraph, vertices: Tensor) -> Mask:
        """The mask that keeps the given vertices (K) of the weight graph and switches off all others."""
        keep = torch.zeros(graph.num_vertices, device=vertices.device).index_fill(0, vertices, 1)
        return Mask(graph.layers, tuple(graph.split(keep)))

    @staticmethod
    def on(model: nn.Module) -> Mask | None:
        """The mask that a model carries; None where it carries none."""
        masks = {index: mask for index, layer in enumerate(weight_layers(model)) if (mask := weight_mask(layer))}
        forgets = sorted({label for mask in masks.values() for label in mask.forgets})
        return Mask(tuple(masks), tuple(mask.keep for mask in masks.values()), tuple(forgets)) if masks else None

    def __post_init__(self) -> None:
        is_right = len(self.layers) == len(self.keep) == len(set(self.layers)) > 0
        if not is_right or not all(type(each) is int and 0 <= each < 2**31 for each in (*self.layers, *self.forgets)):
            has = f"{len(self.keep)} masks for layers {self.layers}, classes {self.forgets}"[:200]
            raise ValueError(
                f"a mask must have indices of layers, each once, a matrix for each, and classes, not {has}"
            )
        if not all(keep.ndim in (2, 4) and keep.numel() and ((keep == 0) | (keep == 1)).all() for keep in self.keep):
            raise ValueError("a mask must have matrices of 0 and 1 alone")

    def __repr__(self) -> str:
        counts = (f"layer {layer}: {int((k == 0).sum())} of {k.numel()}" for layer, k in zip(self.layers, self.keep))
        return f"Mask({', '.join(counts)} weights zeroed)"

    def __and__(self, other: Mask) -> Mask:
        """The mask that keeps what both keep, and forgets what either forgets."""
        keep = dict(zip(self.layers, self.keep))
        for layer, of_other in zip(other.layers, other.keep):
            own = keep.get(layer, of_other)
            if own.shape != of_other.shape:
                shapes = f"{tuple(own.shape)} and {tuple(of_other.shape)}"
                raise ValueError(f"masks of one classifier combine: of layer {layer} these have {shapes}")
            keep[layer] = own * of_other.to(own)
        layers = tuple(sorted(keep))
        return Mask(layers, tuple(map(keep.get, layers)), tuple(sorted({*self.forgets, *other.forgets})))

    @property
    def num_zeroed(self) -> int:
        """How many weights it switches off, kappa."""
        return sum(int((keep == 0).sum()) for keep in self.keep)

    def as_tensor(self) -> Tensor:
        """The layer's shape (m, n) for one masked layer, flat in vertex order (vertices) for several."""
        return self.keep[0] if len(self.keep) == 1 else torch.cat([keep.flatten() for keep in self.keep])

    def vertices(self) -> Tensor:
        """The vertices that it switches off, in the weight graph of its layers."""
        return (torch.cat([keep.flatten() for keep in self.keep]) == 0).nonzero()[:, 0]

    def includes(self, other: Mask) -> bool:
        """Whether it switches off all that the other does."""
        own = dict(zip(self.layers, self.keep))
        pairs = [(own.get(layer), keep) for layer, keep in zip(other.layers, other.keep)]
        return all(keep is not None and bool((keep <= of_other.to(keep)).all()) for keep, of_other in pairs)

    def check(self, model: nn.Module) -> list[nn.Module]:
        """The masked layers of a model. Raises ValueError where one has another shape or no weight to put a mask on."""
        layers = weight_layers(model)
        for index, keep in zip(self.layers, self.keep):
            shape = shape_of(layers[index]) if index < len(layers) else "not there"
            if shape != tuple(keep.shape):
                raise ValueError(f"layer {index} is {shape}, its mask {tuple(keep.shape)}")
            if "weight" not in layers[index]._parameters and weight_mask(layers[index]) is None:
                raise ValueError(
                    f"layer {index} has no plain weight, but what torch.nn.utils (prune, weight_norm, spectral_norm, "
                    "parametrize) computes: make it one first, by prune.remove, remove_parametrizations or their like"
                )
        return [layers[index] for index in self.layers]

    def apply(self, model: nn.Module, permanent: bool = False) -> None:
        """Switches the weights off, or where it raises, leaves the model as it was.

        The zeros stand beside the weights, for `remove` to take them off again: the state dict still holds the weights
        from before, as `parametrizations.weight.original`, and with them the class. permanent: the zeros are written
        into the weights, for those who must delete: the state dict holds nothing of them, and its keys are plain. (The
        momentum of an optimizer from before would bring something back: take a new one.)
        It takes the place of a mask that the model carries, which it must include.
        Raises ValueError where it carries another one, a layer has another shape, or no weight of its own.
        """
        layers, carried = self.check(model), Mask.on(model)
        if carried is not None and not self.includes(carried):
            raise ValueError(f"the model carries {carried}: take it off first, or apply mask & Mask.on(model)")
        if permanent:
            names = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
            if shared := [index for index, layer in zip(self.layers, layers) if names[id(original_weight(layer))] > 1]:
                raise ValueError(
                    f"layers {shared} share their weights with others: permanent zeros would be theirs, too"
                )
        with all_or_none(layers):
            for layer, keep in zip(layers, self.keep):
                take_off(layer)
                if permanent:
                    layer.weight.data.masked_fill_(keep.to(layer.weight.device) == 0, 0)
                else:
                    put_on(layer, WeightMask(keep.to(layer.weight), self.forgets))

    def remove(self, model: nn.Module) -> None:
        """Takes the mask off again: the weights are those from before, bit for bit, and in the same order.

        If they were trained meanwhile, they are as trained. Raises ValueError where the model does not carry this mask.
        """
        layers = self.check(model)
        for index, layer, keep in zip(self.layers, layers, self.keep):
            found = weight_mask(layer)
            if found is None or not torch.equal(found.keep, keep.to(found.keep)):
                raise ValueError(f"layer {index} carries {'no' if found is None else 'another'} mask: {self} is not on")
        with all_or_none(layers):
            for layer in layers:
                take_off(layer)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The masked model for as long as the context is open."""
        self.apply(model)
        try:
            yield model
        finally:
            self.remove(model)

    def saved(self) -> dict[str, list]:
        """The mask as `save` writes it: `layers`, `keep`, a tensor of bool for each, and `forgets`."""
        keep = [keep.bool().cpu() for keep in self.keep]
        return {"layers": list(self.layers), "keep": keep, "forgets": list(self.forgets)}

    def save(self, path: Path | str) -> None:
        files.save(Path(path), self.saved())

    @staticmethod
    def load(path: Path | str) -> Mask:
        """Raises ArtifactError where the file is not a mask."""
        saved = files.load(Path(path))
        try:
            layers, keep, forgets = (saved[key] for key in ("layers", "keep", "forgets"))
            if not all(each.dtype == torch.bool for each in keep):
                raise ValueError("keep must be of bool")
            return Mask(tuple(layers), tuple(each.float() for each in keep), tuple(forgets))
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise files.ArtifactError(f"{path}: is not a mask ({files.one_line(error)})") from None


def weight_mask(layer: nn.Module) -> WeightMask | None:
    """What is on the layer's weight, if it is a mask and nothing else."""
    found = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else ()
    return found[0] if len(found) == 1 and isinstance(found[0], WeightMask) else None


def original_weight(layer: nn.Module) -> Tensor:
    """The weight under a mask, or without one."""
    return layer.weight if weight_mask(layer) is None else layer.parametrizations["weight"].original


def put_on(layer: nn.Module, mask: WeightMask) -> None:
    parametrize.register_parametrization(layer, "weight", mask)
    type(layer).__getstate__ = refuse_pickling  # of a class that the layer has for itself


def take_off(layer: nn.Module) -> None:
    """Takes a mask off, where there is one."""
    if weight_mask(layer) is None:
        return
    # PyTorch takes the weight off its class, which copies of the layer share: now this one has its own.
    own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    # PyTorch puts the weight back behind the others; an optimizer's state goes by the order of parameters.
    for name in [name for name in layer._parameters if name != "weight"]:
        layer._parameters[name] = layer._parameters.pop(name)


@contextmanager
def all_or_none(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Gives layers back the masks and the weights that they had, where the context raises."""
    before = [(layer, weight_mask(layer), original_weight(layer).detach().clone()) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, mask, weight in before:
            take_off(layer)
            layer.weight.data.copy_(weight)
            if mask is not None:
                put_on(layer, mask)
        raise


# What follows makes it fast.

# Small graphs share what is done to their neurons; large ones, together, would leave the cache.
VERTICES_AT_ONCE = 2**17  # of a batch of graphs that the GCN scores


@dataclass(frozen=True)
class AffineFeatures:
    """Vertex features of one masked layer in the form y[r, c] = x[r, c] M + source[c] + target[r].

    A linear round on them changes M, source and target alone, all of them small: the features of the vertices are
    formed when a non-linearity needs them.
    """

    x: Tensor  # (batch, m, n, in)
    source_sums: Tensor  # of x over the weights of each source neuron, (batch, n, in)
    target_sums: Tensor  # of x over the weights of each target neuron, (batch, m, in)
    matrix: Tensor | None = None  # M, (in, features); without it y is x
    source: Tensor | None = None  # (batch, n, features)
    target: Tensor | None = None  # (batch, m, features)

    @staticmethod
    def of(x: Tensor) -> AffineFeatures:
        return AffineFeatures(x, x.sum(1), x.sum(2))

    def formed(self) -> Tensor:
        """y, (batch, m, n, features)."""
        return self.x if self.matrix is None else self.x @ self.matrix + self.source[:, None] + self.target[:, :, None]

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of y over the weights of each source neuron (batch, n, features) and target neuron (batch, m, features)."""
        if self.matrix is None:
            return self.source_sums, self.target_sums
        m, n = self.x.shape[1:3]
        of_source = self.source_sums @ self.matrix + m * self.source + self.target.sum(1, keepdim=True)
        of_target = self.target_sums @ self.matrix + n * self.target + self.source.sum(1, keepdim=True)
        return of_source, of_target

    def transformed(self, matrix: Tensor, source: Tensor, target: Tensor) -> AffineFeatures:
        """y[r, c] M' + source'[c] + target'[r], with an M' (features, out)."""
        if self.matrix is not None:
            source = self.source @ matrix + source
            target = self.target @ matrix + target
            matrix = self.matrix @ matrix
        return replace(self, matrix=matrix, source=source, target=target)

    def relu(self) -> Tensor:
        """relu(y), (batch, m, n, features)."""
        if self.matrix is None:
            return self.x.relu()
        return AffineReLU.apply(self.x, self.matrix, self.source, self.target)


class AffineReLU(torch.autograd.Function):
    """relu(x[r, c] M + source[c] + target[r]): the only work of the GCN that touches every vertex.

    Graph by graph, so that its tensors stay in the cache; and without the copies of autograd's own formulas.
    """

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
        output = x.new_empty(*x.shape[:3], matrix.shape[1])
        for x_of, source_of, target_of, y in zip(x, source, target, output):
            torch.add(source_of, target_of[:, None], out=y)
            y.flatten(0, 1).addmm_(x_of.flatten(0, 1), matrix).relu_()
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
            of_y = torch.ops.aten.threshold_backward(gradient[index], y, 0)
            flat = of_y.flatten(0, 1)
            # A gradient x^T g is formed twice as fast as g^T x.
            of_matrix.addmm_(x_of.flatten(0, 1).T, flat)
            of_source.append(of_y.sum(0))
            of_target.append(of_y.sum(1))
            if of_x is not None:
                torch.mm(flat, matrix.T, out=of_x[index].flatten(0, 1))
        return of_x, of_matrix, torch.stack(of_source), torch.stack(of_target)


def keep_freed_memory() -> None:
    """Lets glibc keep all freed memory for the next tensors instead of giving it back to the system.

    Without it every tensor of more than 32 MB gets new pages, and the tensors of a small graph often do: mapping them
    takes longer than the arithmetic (`tests/benchmark.py`). Does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no tensor gets pages of its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: no limit
