"""What a network computes, node by node: which channels are one neuron, and from where on it runs by itself."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

# Operations by their names, as `name_of` gives them to modules, functions and methods alike.
RECTIFIERS = {"relu", "relu6", "leakyrelu"}
SMOOTH = {"gelu", "silu", "elu", "selu", "celu", "softplus", "tanh", "sigmoid", "hardswish", "mish", "prelu"}
NORMALISATION = {"batchnorm", "batchnorm1d", "batchnorm2d", "groupnorm", "instancenorm2d"}
UNCHANGED = {"dropout", "dropout1d", "dropout2d", "identity", "contiguous", "clone", "to", "float"}
REDUCTION = {"mean", "amax"}  # which is pooling where it goes over positions alone
POOLING = {"maxpool2d", "avgpool2d", "adaptiveavgpool2d", "adaptivemaxpool2d", "interpolate"} | REDUCTION
RESHAPING = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"}
JOINING = {"add", "sub", "mul"}
CONCATENATING = {"cat", "concat", "concatenate"}
CHANNELWISE = RECTIFIERS | SMOOTH | NORMALISATION | UNCHANGED | POOLING | JOINING


class Ends(NamedTuple):
    """Which neurons the weights of a layer join: the number of that of every column (n) and row (m) of its matrix."""

    sources: Tensor
    targets: Tensor


def is_weight_layer(module: nn.Module) -> bool:
    """Whether masks can be put on a module: a linear layer, or a convolution."""
    return isinstance(module, nn.Linear | nn.Conv2d)


class Tracer(fx.Tracer):
    """Leaves weight layers whole, those of a subclass too where it computes what the class does."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        is_plain = is_weight_layer(module) and type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        return is_plain or super().is_leaf_module(module, name)


class Trace:
    """A network as the nodes of a graph (torch.fx), and what masks need to know of them.

    A neuron is a channel, or a unit of a linear layer: the second dimension. Channels go through elementwise functions,
    normalisation, dropout and pooling as they are, a flatten reads each of them at all of its positions, addition makes
    two of them one, concatenation puts them side by side. Any other operation gives new ones.

    of_samples: the nodes whose values depend on what the network is given; others are the same for all samples
    calls: the node that calls a weight layer, in the order of the modules; None where it is called several times, or
        not on features or channels of every sample
    activations: the node of each layer's output activation, and whether it is rectified
    Raises ValueError where the network cannot be traced, or gives other logits than its nodes.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        modules = dict(network.named_modules())
        for module in modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False  # what is recorded of a layer must stay as it was
        try:
            graph = not_in_place(Tracer().trace(network))
            graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        except Exception as error:  # of a model of the user's own
            raise ValueError(f"torch.fx cannot trace it ({type(error).__name__})") from error
        self.nodes = list(graph.nodes)
        self.names = {node: name_of(node, modules) for node in self.nodes}
        self.output = self.nodes[-1].all_input_nodes[0]
        self._places = {node: place for place, node in enumerate(self.nodes)}
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if node.users:
                self._last_uses[max(node.users, key=self._places.__getitem__)].append(node)
        self._images = self.nodes[0]
        self._starts = {self._images: 0}
        self.of_samples = {self._images}
        for node in self.nodes:
            if not self.of_samples.isdisjoint(node.all_input_nodes):
                self.of_samples.add(node)
        self._shapes: dict[fx.Node, torch.Size] = {self._images: example.shape}
        self._over_channels: set[fx.Node] = set()  # reductions that are no pooling
        with torch.no_grad():
            found = self.run(network, example, compute=self._noted)[self.output]
            if not isinstance(found, Tensor) or not torch.allclose(found, network(example), 1e-3, 1e-4, equal_nan=True):
                raise ValueError("its operations, one after the other, give other logits than itself")
        layers = [module for module in modules.values() if is_weight_layer(module)]
        self.calls: list[fx.Node | None] = []
        for layer in layers:
            nodes = [node for node in self.nodes if node.op == "call_module" and modules[node.target] is layer]
            shapes = [self._shapes[node] for node in nodes]
            ndim = 2 if isinstance(layer, nn.Linear) else 4
            is_right = len(nodes) == 1 and len(shapes[0]) == ndim and len(example) == shapes[0][0]
            self.calls.append(nodes[0] if is_right else None)
        self.activations = [node and self._activation(node) for node in self.calls]
        self.ends = self._ends(layers)
        last = next((node for node in self.calls[::-1] if node is self.output), None)
        self.representation = self.output if last is None else last.all_input_nodes[0]
        numbers = [prod(shape[1:]) for shape in self._shapes.values()]  # of one sample
        self.largest = max(numbers)
        self.total = sum(numbers)
        self._find_starts()

    def __deepcopy__(self, memo: dict) -> Trace:
        return self

    def run(
        self,
        network: nn.Module,
        value: Tensor,
        first: Sequence[int] | None = None,
        compute: Callable[[fx.Node, Any, tuple, dict], Any] | None = None,
        watched: Sequence[fx.Node] = (),
        end: fx.Node | None = None,
    ) -> dict[fx.Node, Any]:
        """The values of the output and of `watched` nodes.

        value: what the network is given; with `first`, that of the node from which these layers can be reached
        compute: gives the value of a node from the arguments and what it calls: a module or a function, the name of a
            method, the value of an attribute; end: the node to stop at
        """
        start = self._images if first is None else self.start_of(first)
        values = {start: value}
        keep = {self.output, *watched}
        for node in self.nodes[:-1]:
            if self._places[node] > self._starts[start] or node.op == "get_attr":
                arguments, named = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                is_part = node.op in ("call_module", "get_attr")
                callee = operator.attrgetter(node.target)(network) if is_part else node.target
                values[node] = (compute or call)(node, callee, arguments, named)
                for spent in set(self._last_uses[node]) - keep:
                    values.pop(spent, None)
            if node is end:
                break
        return values

    @property
    def maskable(self) -> list[int]:
        """The layers that can be masked, in the order in which they are called."""
        able = [index for index, ends in enumerate(self.ends) if ends is not None]
        return sorted(able, key=lambda index: self._places[self.calls[index]])

    def start_of(self, layers: Sequence[int]) -> fx.Node:
        """The last node before all of these weight layers whose value is all that the rest of the network needs."""
        first = min(self._places[self.calls[layer]] for layer in layers)
        return max((node for node, place in self._starts.items() if place < first), key=self._starts.__getitem__)

    def positions(self, layer: int) -> int:
        """At how many positions the kernels of a convolution stand; 1 of a linear layer."""
        return prod(self._shapes[self.calls[layer]][2:])

    def _activation(self, call: fx.Node) -> tuple[fx.Node, bool]:
        """The node of a layer's output activation, behind normalisation and addition, and whether it is rectified."""
        node = call
        while len(node.users) == 1:
            (user,) = node.users
            name = self.names[user]
            if self._shapes.get(user) != self._shapes[node] or name not in CHANNELWISE:
                break
            node = user
            if name in RECTIFIERS | SMOOTH:
                return node, name in RECTIFIERS
        return call, False

    def _noted(self, node: fx.Node, callee: Any, arguments: tuple, named: dict) -> Any:
        """What a node gives, its shape noted, and whether it is a reduction over other dimensions than positions."""
        value = call(node, callee, arguments, named)
        if isinstance(value, Tensor):
            self._shapes[node] = value.shape
        if self.names[node] in REDUCTION and not is_over_positions(arguments, named):
            self._over_channels.add(node)
        return value

    def _find_starts(self) -> None:
        """Notes the nodes whose value is all that later ones need, and the place from which on it is."""
        alive: set[fx.Node] = set()
        for place, node in enumerate(self.nodes[:-1]):
            if node.op != "get_attr" and node.users:
                alive.add(node)
            alive.difference_update(self._last_uses[node])
            if len(alive) == 1 and (single := next(iter(alive))) in self._shapes:
                self._starts.setdefault(single, place)

    def _ends(self, layers: Sequence[nn.Module]) -> list[Ends | None]:
        """The neurons that each weight layer joins, by numbers of their own; None for those that masks cannot have."""
        parents: list[int] = []

        def new(count: int) -> Tensor:
            parents.extend(range(len(parents), len(parents) + count))
            return torch.arange(len(parents) - count, len(parents))

        def root(neuron: int) -> int:
            while parents[neuron] != neuron:
                neuron = parents[neuron]
            return neuron

        channels: dict[fx.Node, Tensor] = {}  # of every node with a batch of values, along the second dimension
        for node in self.nodes:
            shape = self._shapes.get(node, ())
            if len(shape) < 2 or node not in self.of_samples:
                continue
            name = self.names[node]
            of_inputs = [each for each in node.all_input_nodes if each in channels]
            given = [channels[each] for each in of_inputs if self._shapes[each][0] == shape[0]]
            if node in self._over_channels:
                channels[node] = new(shape[1])
            elif name in CONCATENATING and sum(map(len, given)) == shape[1]:
                channels[node] = torch.cat(given)
            elif name in RESHAPING and len(given) == 1 and len(shape) == 2 and shape[1] % len(given[0]) == 0:
                channels[node] = given[0].repeat_interleave(shape[1] // len(given[0]))
            elif name in CHANNELWISE | RESHAPING and given and all(len(each) == shape[1] for each in given):
                channels[node] = given[0]
                for other in given[1:]:
                    for one, another in zip(given[0].tolist(), other.tolist()):
                        parents[root(one)] = root(another)
            else:
                channels[node] = new(shape[1])
        roots = torch.tensor([root(neuron) for neuron in range(len(parents))])
        ends: list[Ends | None] = []
        for node, layer in zip(self.calls, layers):
            if node is None:
                ends.append(None)
                continue
            sources = roots[channels[node.all_input_nodes[0]]]
            if isinstance(layer, nn.Conv2d):
                sources = sources.repeat_interleave(prod(layer.kernel_size))
            ends.append(Ends(sources, roots[channels[node]]))
        return ends


def name_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node does, the same for a module, a function and a method: `relu`, `maxpool2d`."""
    if node.op == "call_module":
        name = type(modules[node.target]).__name__
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.lower().replace("_", "")


def is_over_positions(arguments: tuple, named: dict) -> bool:
    """Whether the dimensions that a mean or a maximum goes over, `dim` of them, are all behind the channels."""
    given = dict(zip(("input", "dim"), arguments)) | named
    dims = given.get("dim", given.get("axis"))
    dims = [dims] if isinstance(dims, int) else dims
    return bool(dims) and all(each % given["input"].ndim > 1 for each in dims)


def not_in_place(graph: fx.Graph) -> fx.Graph:
    """The same graph, its operations giving new values instead of changing those that they are given."""
    for node in graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target = node.target[:-1]
    return graph


def call(node: fx.Node, callee: Any, arguments: tuple, named: dict) -> Any:
    """What a node gives for its arguments; an input beside the samples, its default."""
    if node.op == "get_attr":
        return callee
    if node.op == "placeholder":
        return arguments[0]
    if node.op == "call_method":
        return getattr(arguments[0], callee)(*arguments[1:], **named)
    return callee(*arguments, **named)
