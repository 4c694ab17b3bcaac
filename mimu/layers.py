"""What a masked layer does on samples: what its weight is multiplied with, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

# Operations of PyTorch's ATen, by their names.
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
# They move values to another place in memory, and compute none.
MOVING = set(
    "cat channel_shuffle clone column_stack concat constant_pad_nd diagonal_scatter dstack flip getitem hstack index "
    "index_select pad pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 select_scatter slice_scatter "
    "stack tile unsafe_chunk unsafe_split _unsafe_view vstack".split()
)
REDUCING = {"mean", "sum", "amax", "amin"}  # over the dimensions `dim`
POOLING = ("max_pool", "avg_pool", "adaptive_", "upsample_")  # over the last dimensions; what names begin with
# They mix places, and may leave the shape as it is all the same.
MIXING = set(
    "addmm baddbmm bilinear cdist col2im conv_transpose1d conv_transpose2d conv_transpose3d cumprod cumsum einsum "
    "embedding gather grid_sampler inner mm sort tensordot topk".split()
)


class Ends(NamedTuple):
    """Which neurons the weights of a layer join, by numbers.

    sources: of every column (groups * n), of a grouped convolution those of one group behind those of another
    targets: of every row (m)
    """

    sources: Tensor
    targets: Tensor


def name_of(node: fx.Node) -> str:
    """The name of an operation, whatever its overload: `conv2d`, `relu`, `getitem`."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else getattr(node.target, "__name__", "")


def is_moving(node: fx.Node) -> bool:
    """Whether an operation moves values, or gives a view of them, and computes none."""
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(each.alias_info is not None for each in schema.returns)
    return name_of(node) in MOVING or is_view and name_of(node) != "to"


def argument(node: fx.Node, name: str) -> Any:
    """What an operation is given as an argument, or takes by default."""
    for place, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, each.default_value)
    return None


class Neurons:
    """The number of its neuron at every place of every value, 0 where none is known.

    A linear operation and a convolution make new neurons, of their rows. What moves values moves their numbers; what
    reduces or pools them keeps the numbers that are the same all along; normalisation and elementwise functions of one
    value keep all. Elementwise functions of two make the neurons of a place one, where they meet in pairs. Attention
    and products of two values pass on those of the one that is averaged over its places. Any other operation gives
    none: what reads it numbers its channels anew.

    Every tensor of numbers is of two samples, and 1 long where the numbers are the same along a dimension.
    """

    def __init__(self) -> None:
        self.ends: dict[fx.Node, Ends] = {}
        self._parents = [0]
        self._numbers: dict[fx.Node, Any] = {}
        self._shapes: dict[fx.Node, torch.Size] = {}
        self._others: dict[fx.Node, Any] = {}  # values that are no features, as indices
        self._read: dict[fx.Node, Tensor] = {}  # the numbers that were made for what a layer reads

    def resolved(self) -> dict[fx.Node, Ends]:
        """The ends of every linear operation and convolution, neurons that are one by one number."""
        return {node: Ends(*map(self._root, ends)) for node, ends in self.ends.items()}

    def follow(self, node: fx.Node, value: Any, is_of_samples: bool) -> None:
        """Numbers the value of an operation, those before it being numbered."""
        if isinstance(value, Tensor):
            self._shapes[node] = value.shape
        if is_of_samples and (isinstance(value, tuple | list) or value.is_floating_point()):
            self._numbers[node] = self._of(node, value)
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            self._others[node] = value

    def _of(self, node: fx.Node, value: Any) -> Any:
        name = name_of(node)
        given = [self._numbers[each] for each in node.all_input_nodes if isinstance(self._numbers.get(each), Tensor)]
        if name == "linear" or name in CONVOLUTIONS:
            return self._layer(node, value)
        if is_moving(node):
            return self._moved(node, name)
        if name.startswith(POOLING):
            over = next(int(each) for each in name if each.isdigit())
            pooled = self._same(given[0], tuple(range(-over, 0)), True)
            return pooled if isinstance(value, Tensor) else [pooled]
        if not isinstance(value, Tensor):
            return [torch.zeros((1,) * each.ndim, dtype=torch.double) for each in value if isinstance(each, Tensor)]
        nothing = torch.zeros((1,) * value.ndim, dtype=torch.double)
        if name in REDUCING:
            dims = argument(node, "dim")
            return self._same(given[0], tuple(dims), argument(node, "keepdim")) if dims else nothing
        if name == "scaled_dot_product_attention":
            return self._same(self._numbers_of(node.args[2]), (-2,), True)
        if name in ("matmul", "bmm"):
            one, other = map(self._numbers_of, node.args[:2])
            if min(one.ndim, other.ndim) < 2:
                return nothing
            of_columns = self._same(other, (-2,), True)
            return of_columns if of_columns.any() else self._same(one, (-1,), True)
        if name in MIXING or not all(is_spread_over(each, value) for each in given):
            return nothing
        found, *others = given or [nothing]
        for each in others:
            found = self._joined(found, each)
        return found

    def _layer(self, node: fx.Node, value: Tensor) -> Tensor:
        """New numbers for the rows of a linear operation or a convolution, whose ends are noted."""
        is_convolution = name_of(node) in CONVOLUTIONS
        channels = 1 if is_convolution else value.ndim - 1
        read = node.args[0]
        if read not in self._read:
            x = self._numbers_of(read)
            count = self._shapes[read][channels]
            others = tuple(dim for dim in range(x.ndim) if dim != channels)
            sources = self._same(x, others, False).expand(count).clone()
            is_new = sources == 0
            sources[is_new] = self._new(int(is_new.sum()))
            self._read[read] = sources
        sources = self._read[read]
        if is_convolution:
            sources = sources.repeat_interleave(prod(node.args[1].meta["val"].shape[2:]))
        targets = self._new(value.shape[channels])
        self.ends[node] = Ends(sources, targets)
        return targets.view([-1 if dim == channels else 1 for dim in range(value.ndim)])

    def _moved(self, node: fx.Node, name: str) -> Any:
        def stand_in(each: fx.Node) -> Any:
            if each in self._others:
                return self._others[each]
            found = self._numbers_of(each)
            return found.expand(self._shapes.get(each, found.shape)) if isinstance(found, Tensor) else found

        arguments, named = fx.node.map_arg((node.args, node.kwargs), stand_in)
        if name == "getitem":
            return dict(enumerate(arguments[0])).get(
                arguments[1], torch.zeros((1,) * node.meta["val"].ndim, dtype=torch.double)
            )
        if name in ("view", "_unsafe_view"):  # the numbers lie otherwise in memory
            found = arguments[0].reshape(arguments[1])
        else:
            found = node.target(*arguments, **named)
        return short(found) if isinstance(found, Tensor) else [short(each) for each in found]

    def _numbers_of(self, node: fx.Node) -> Any:
        if node in self._numbers:
            return self._numbers[node]
        return torch.zeros((1,) * node.meta["val"].ndim, dtype=torch.double)

    def _same(self, x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        """The numbers that are the same along dimensions, as far as there are any; 0 for others."""
        x = self._root(x)
        largest = x.amax(dims, keepdim)
        smallest = x.masked_fill(x == 0, torch.inf).amin(dims, keepdim)
        return largest * (largest == smallest)

    def _joined(self, one: Tensor, other: Tensor) -> Tensor:
        """The numbers of both, the neurons of a place made one, if every one of the one meets one of the other alone.

        Where they do not, as tokens and channels, those of the first, if it has several.
        """
        one, other = self._root(one), self._root(other)
        both = torch.broadcast_tensors(one, other)
        meet = (both[0] != 0) & (both[1] != 0)
        pairs = (both[0][meet] * 2**26 + both[1][meet]).unique()
        of_one, of_other = (pairs / 2**26).floor(), pairs.remainder(2**26)
        counts = len(of_one.unique()), len(of_other.unique())
        if counts == (len(pairs), len(pairs)):
            for first, second in zip(of_one.long().tolist(), of_other.long().tolist()):
                self._parents[self._find(first)] = self._find(second)
        first, second = both if counts[0] > 1 else both[::-1]
        return short(first.where(first != 0, second))

    def _new(self, count: int) -> Tensor:
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count, dtype=torch.double)

    def _find(self, neuron: int) -> int:
        while self._parents[neuron] != neuron:
            self._parents[neuron] = neuron = self._parents[self._parents[neuron]]
        return neuron

    def _root(self, x: Tensor) -> Tensor:
        """Numbers, each as that of its neuron."""
        used, places = x.unique(return_inverse=True)
        roots = [self._find(each) for each in used.long().tolist()]
        return torch.tensor(roots, dtype=torch.double)[places]


def is_spread_over(x: Tensor, value: Tensor) -> bool:
    """Whether numbers can stand for a value: each of its dimensions is as long as the value's, or 1."""
    sizes = zip(x.shape[::-1], value.shape[::-1])
    return x.ndim <= value.ndim and all(size in (1, of_value) for size, of_value in sizes)


def short(x: Tensor) -> Tensor:
    """The same numbers, 1 long in each dimension along which they do not change."""
    for dim, size in enumerate(x.shape):
        first = x.narrow(dim, 0, min(1, size))
        if size > 1 and (x.stride(dim) == 0 or torch.equal(x, first.expand_as(x))):
            x = first
    return x.clone()


@dataclass(frozen=True)
class Layer:
    """A weight that one linear operation or convolution of a network reads.

    node: the operation; activation: that of its output activation
    batch: the dimension of the operation's values that holds the samples, `parts` of each: one sample after the other,
        or where they are not `in_order` one part of all samples after the other
    positions: at how many places of a sample the weight stands, as tokens; None of a single one, as for features
    """

    node: fx.Node
    shape: tuple[int, ...]
    activation: fx.Node
    is_rectified: bool
    batch: int
    parts: int
    in_order: bool
    positions: int | None

    @property
    def is_convolution(self) -> bool:
        return name_of(self.node) in CONVOLUTIONS

    @property
    def groups(self) -> int:
        """Into how many groups a convolution's rows fall, and the channels that they read."""
        return argument(self.node, "groups") if self.is_convolution else 1

    @property
    def numbers(self) -> int:
        """How many numbers are recorded of a sample."""
        return (self.groups * prod(self.shape[1:]) + 3 * self.shape[0]) * (self.positions or 1)

    def by_sample(self, x: Tensor) -> Tensor:
        """Values of the operation with the samples in front, (samples, parts, ...)."""
        x = x.movedim(self.batch, 0)
        return x.unflatten(0, (-1, self.parts)) if self.in_order else x.unflatten(0, (self.parts, -1)).transpose(0, 1)

    def by_position(self, x: Tensor) -> Tensor:
        """What it gives, or of that: (samples, groups, m / groups, positions), or of features (samples, m)."""
        if x.ndim == 2 and self.positions is None:
            return x
        x = self.by_sample(x)
        x = x.flatten(3).movedim(2, -1) if self.is_convolution else x  # (samples, parts, ..., m)
        return self._at_once(x.reshape(len(x), self.positions or 1, self.groups, -1).permute(0, 2, 3, 1))

    def read(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, of what the operation is given: (samples, groups, n, positions).

        Or of features (samples, n). In memory position after position, as products over samples and positions want it.
        """
        if x.ndim == 2 and self.positions is None:
            return x
        if not self.is_convolution:
            return self._at_once(self.by_sample(x).flatten(1, -2).mT[:, None])
        # To (batch, groups, *places, channels, *kernel).
        x = self.windows(x).unflatten(1, (self.groups, -1)).movedim(2, len(self.shape))
        x = self.by_sample(x.reshape(len(x), self.groups, (self.positions or 1) // self.parts, -1))
        return self._at_once(x.movedim(1, 2).flatten(2, 3).mT)

    def mean_read(self, x: Tensor) -> Tensor:
        """The mean of `read` over the positions, (samples, groups * n); of a convolution without forming it."""
        if not self.is_convolution:
            x = self.read(x)
            return x if self.positions is None else x.flatten(1, 2).mean(2)
        places = [*range(2, len(self.shape))]
        return self.by_sample(self.windows(x).mean(places).flatten(1)).mean(1)

    def windows(self, x: Tensor) -> Tensor:
        """What a convolution reads at each place, as a view, (batch, channels, *places, *kernel)."""
        kernel, steps, apart = self.shape[2:], spread(self.node, "stride"), spread(self.node, "dilation")
        x = padded(self.node, x, kernel)
        for dim, (size, step, between) in enumerate(zip(kernel, steps, apart), 2):
            x = x.unfold(dim, between * (size - 1) + 1, step)[..., ::between]
        return x

    def _at_once(self, x: Tensor) -> Tensor:
        """Values (samples, groups, neurons, positions), of a single place those of features (samples, neurons)."""
        return x[:, 0, :, 0] if self.positions is None else x


def spread(node: fx.Node, name: str) -> list[int]:
    """An argument of a convolution for each dimension of its kernels."""
    given, count = argument(node, name), int(name_of(node)[4])
    return [*given] * count if len(given) == 1 else [*given]


def padded(node: fx.Node, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """What a convolution is given, with its padding of zeros."""
    sides: list[int] = []
    padding = argument(node, "padding")
    for dim, (size, apart) in enumerate(zip(kernel, spread(node, "dilation"))):
        both = apart * (size - 1) if padding == "same" else 0
        before = both // 2 if isinstance(padding, str) else spread(node, "padding")[dim]
        sides = [before, both - before if isinstance(padding, str) else before, *sides]  # of the last dimension first
    return F.pad(x, sides)


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


def weighted_mean(x: Tensor, factor: Tensor) -> Tensor:
    """Mean over the samples of x (classes * groups, samples, m, n) times a factor (classes, samples)."""
    factor = factor.repeat_interleave(len(x) // len(factor), 0)
    return (factor[:, None] @ x.flatten(2)).view(x[:, 0].shape).div_(x.shape[1])


def mean_gradient(record: LayerRecord, factor: Tensor) -> Tensor:
    """Mean over the samples of the gradient of their log-odds times a factor (classes, samples), (classes, m, n)."""
    if record.log_odds_gradient.ndim == 4:
        return weighted_mean(record.log_odds_gradient, factor)
    return (record.log_odds_gradient * factor[..., None]).mT @ record.inputs / factor.shape[1]


def mean_squared_gradient(record: LayerRecord, factor: Tensor) -> Tensor:
    """The same of its squares times a factor, which is not negative."""
    if record.log_odds_gradient.ndim == 4:
        return weighted_mean(record.log_odds_gradient.square(), factor)
    return ((record.log_odds_gradient * factor.sqrt()[..., None]) ** 2).mT @ record.inputs**2 / factor.shape[1]


def mean_signal(record: LayerRecord) -> Tensor:
    """Mean over samples and positions of what a target neuron that is active is given, (classes, m, n)."""
    if record.inputs.ndim == 4:
        return (record.active @ record.inputs.mT).mean(1) / record.inputs.shape[3]
    return record.active.mT @ record.inputs / record.inputs.shape[1]


def mean_activation(x: Tensor) -> Tensor:
    """Mean over the samples and the positions of a convolution, (classes, neurons)."""
    return (x.mean(3) if x.ndim == 4 else x).mean(1)


def class_by_class(x: Tensor, classes: int) -> Tensor:
    """(classes * samples, [groups,] neurons[, positions]) as (classes[ * groups], samples, neurons[, positions])."""
    x = x.unflatten(0, (classes, -1))
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def by_weight(layer: LayerRecord) -> LayerRecord:
    """A record of classes, its gradient that by the weights (classes * groups, samples, m, n) where it sums positions.

    It is formed once for all means; of linear layers of features two factors say the same.
    """
    if layer.inputs.ndim < 4:
        return layer
    return layer._replace(log_odds_gradient=layer.log_odds_gradient @ layer.inputs.mT)


def for_updates(layer: LayerRecord) -> LayerRecord:
    """What first-order updates need of a record `by_weight`: of positions the gradient alone."""
    nothing = layer.inputs.new_empty(0)
    return layer if layer.inputs.ndim < 4 else LayerRecord(nothing, nothing, nothing, layer.log_odds_gradient)
