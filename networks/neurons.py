"""Which values of a network belong to one neuron: numbers that travel through its operations."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
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
