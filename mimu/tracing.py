"""A network exported as operations, which can run under other weights, start midway and be recorded."""

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from mimu.errors import in_one_line
from mimu.layers import Layer
from mimu.operations import CONVOLUTIONS, LAYERS, argument, exported, joined_neurons, name_of, output_activation
from mimu.wrapping import COLLECTIONS, logits_of

PROBABILITIES = {"softmax", "sigmoid"}  # their outputs are no logits
Compute = Callable[[fx.Node, tuple, dict], Any]  # from an operation and its arguments to its value


class Trace:
    """The operations of a network (torch.export) in evaluation mode, for any number of samples.

    Attributes:
        layers: the weights that one linear operation or convolution reads and nothing else, by name, in the order of
            `named_parameters`
        input_nodes: the nodes whose values are the input; one, but for `suffix_after`
        output: the node of the logits
        nodes: all nodes that the output needs beyond the input, in the order in which they run
        sample_nodes: the nodes whose values depend on the input; the others are the same for all samples
        shapes: the shapes of tensors for two samples
        batches: for nodes of samples, the dimension that holds the samples, and how many entries belong to each
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        """Exports a network.

        Args:
            example: some samples, two of which the network is run on
        Raises:
            ValueError: if the network cannot be exported, or gives other logits than its operations
        """
        with in_one_line(ValueError, "torch.export cannot take it for any number of samples"):
            two, three = example[[0, -1]], example[[-1, 0, -1]]
            program = exported(network, two)
            signature = program.graph_signature
            by_name = {node.name: node for node in program.graph.nodes}
            names = signature.inputs_to_parameters | signature.inputs_to_buffers
            constants = signature.inputs_to_lifted_tensor_constants
            self.parameters = {by_name[node]: name for node, name in names.items()}
            self.constants = {by_name[node]: program.constants[name] for node, name in constants.items()}
            self.input_nodes = (by_name[signature.user_inputs[0]],)
            self.output = by_name[signature.user_outputs[0]]
            self.module = program.graph_module
            self.sizes: dict[fx.Node, tuple[int, int]] = {}  # whole numbers for two samples, and the rise for one more
            self._schedule()
            self._measure(network, two, three)
        self._schedule()

    def __deepcopy__(self, memo: dict) -> "Trace":
        return self

    def suffix_from(self, layers: Sequence[str]) -> "Trace":
        """The operations from `start_of` the layers on; the input is that node's value."""
        return self._suffix([self.start_of(layers)])

    def suffix_after(self, layer: str) -> "Trace":
        """The operations after a layer; the input is the layer's output and all else that they need.

        Raises:
            ValueError: if one of these values has no dimension of samples in front
        """
        node = self.layers[layer].node
        needed = next(set(needed) for each, needed in self._needed_after() if each is node)
        if any(self.batches.get(each) != (0, 1) for each in needed):
            raise ValueError(f"behind {layer} values have no dimension of samples in front")
        return self._suffix([node, *(needed - {node})])

    def _suffix(self, nodes: Sequence[fx.Node]) -> "Trace":
        suffix = copy.copy(self)
        suffix.input_nodes = tuple(nodes)
        suffix._schedule()
        return suffix

    def run(
        self,
        network: nn.Module,
        value: Tensor | Sequence[Tensor],
        compute: Compute | None = None,
        watched: Sequence[fx.Node] = (),
        end: fx.Node | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """Runs the operations and returns the values of the output and of the `watched` nodes.

        Args:
            value: the input, one tensor for each of `input_nodes`
            compute: computes the value of an operation, by default by calling it
            end: the node to stop after
            weights: replace those of layers, by name; no gradient then reaches any other weight
        """
        inputs = [value] if isinstance(value, Tensor) else value
        values: dict[fx.Node, Any] = dict(zip(self.input_nodes, inputs))
        values |= {self.layers[name].node.args[1]: weight for name, weight in (weights or {}).items()}
        keep = {self.output, end, *watched}
        for node in self.nodes:
            if node in values:
                pass
            elif node in self.parameters:
                weight = operator.attrgetter(self.parameters[node])(network)
                values[node] = weight if weights is None else weight.detach()
            elif node in self.constants:
                values[node] = self.constants[node].to(inputs[0].device)
            elif node in self.sizes:
                size, rise = self.sizes[node]
                values[node] = size + rise * (len(inputs[0]) - 2)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self.module)  # such as the operations under no_grad
            else:
                arguments, keywords = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = (compute or call)(node, arguments, keywords)
            for spent in self._last_uses[node]:
                if spent not in keep:
                    del values[spent]
            if node is end:
                break
        return values

    def start_of(self, layers: Sequence[str]) -> fx.Node:
        """The last node before all of the layers whose value, samples in front, is all that the suffix needs."""
        names, (start,) = self.called, self.input_nodes
        for node, needed in self._needed_after():
            if names.get(node) in layers:
                break
            if len(needed) == 1 and self.batches.get(single := next(iter(needed))) == (0, 1):
                start = single
        return start

    def _needed_after(self) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
        """Every node, and the sample-dependent nodes whose values are still needed after it."""
        needed: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.sample_nodes:
                needed.add(node)
            needed.difference_update(self._last_uses[node])
            yield node, needed

    @property
    def called(self) -> dict[fx.Node, str]:
        """The names of the layers by their operations, in the order in which these run."""
        names = {layer.node: name for name, layer in self.layers.items()}
        return {node: names[node] for node in self.nodes if node in names}

    @property
    def representation(self) -> fx.Node:
        """The input of the last layer; the output itself if the network does not end in a linear layer."""
        is_last = any(layer.node is self.output and layer.positions is None for layer in self.layers.values())
        return self.output.args[0] if is_last else self.output

    @property
    def names_at_the_end(self) -> list[str]:
        """The linear layers of features that the network ends in, with a ReLU between two; or else the last layer."""
        names, node = self.called, self.output
        row: list[str] = []
        while node in names and self.layers[names[node]].positions is None:
            row.insert(0, names[node])
            node = before_dropout(node.args[0])
            if name_of(node) != "relu":
                break
            node = before_dropout(node.args[0])
        return row or [*names.values()][-1:]

    def check_logits(self) -> None:
        """Raises ValueError where the output cannot be logits."""
        layers, after_layers = {*self.called}, {self.output}
        for node in reversed(self.nodes):
            if node in after_layers - layers:
                if name_of(node) in PROBABILITIES:
                    must = "must end in a layer that gives the logits"
                    raise ValueError(f"{must}, but ends in a {name_of(node)}: give it without")
                after_layers |= self.sample_nodes.intersection(node.all_input_nodes)

    def _schedule(self) -> None:
        """Finds the nodes that the output needs beyond the input, and the values that are spent after each."""
        needed, available = {*self.input_nodes, self.output}, {*self.input_nodes, *self.sizes}
        for node in reversed(self.output.graph.nodes):
            if node in needed and node not in available:
                needed.update(node.all_input_nodes)
        self.nodes = [node for node in self.output.graph.nodes if node in needed]
        last_users: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node not in available:
                last_users.update(dict.fromkeys(node.all_input_nodes, node))
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, user in last_users.items():
            self._last_uses[user].append(node)

    @torch.no_grad()
    def _measure(self, network: nn.Module, two: Tensor, three: Tensor) -> None:
        """Runs the operations on two and on three samples, to find the values of samples, their shapes and layers."""
        readers = self._readers(network)
        observed: list[dict[fx.Node, Any]] = []  # the shapes of tensors, and numbers
        layer_inputs: list[dict[fx.Node, Tensor]] = []
        logits = []

        def observe(node: fx.Node, arguments: tuple, keywords: dict) -> Any:
            value = call(node, arguments, keywords)
            number = value if isinstance(value, int | float) else None
            observed[-1][node] = value.shape if isinstance(value, Tensor) else number
            # If samples are neither first nor second, several parts of each may stand in one dimension.
            if node in readers and 2 not in observed[0].get(node.args[0], (2,))[:2]:
                layer_inputs[-1][node] = arguments[0]
            return value

        for x in (two, three):
            observed.append(dict.fromkeys(self.input_nodes, x.shape))
            layer_inputs.append({})
            logits.append(self.run(network, x, observe)[self.output])
        is_as_exported = torch.allclose(logits[0], logits_of(network(two)), 1e-3, 1e-4, equal_nan=True)
        if not is_as_exported or not torch.allclose(logits[1][1:], logits[0], 1e-2, 1e-3, equal_nan=True):
            raise ValueError("its operations, one after the other, give other logits than itself")
        self._compare(observed[0], observed[1])
        self.layers: dict[str, Layer] = {}
        nodes = {name: node for node, name in readers.items()}
        neurons = joined_neurons([node for node in self.nodes if node in self.sample_nodes], self.shapes)
        for name, weight in network.named_parameters():
            node = nodes.get(name)
            batch = self.batches.get(node)
            # Input and output must hold samples alike: linear layers may read the tokens of all samples in one row.
            if batch is not None and self.batches.get(node.args[0]) == batch:
                pair = [inputs.get(node) for inputs in layer_inputs]
                in_order = True if pair[0] is None else is_in_order(pair[0], pair[1], batch[0], batch[1])
                if in_order is not None:
                    self.layers[name] = self._described(node, weight.shape, in_order, neurons[node])

    def _compare(self, observed: Mapping[fx.Node, Any], observed_more: Mapping[fx.Node, Any]) -> None:
        """Compares shapes and numbers for two samples with those for three.

        Raises:
            ValueError: if a number that is not whole depends on the samples
        """
        self.sample_nodes = {*self.input_nodes}
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.batches: dict[fx.Node, tuple[int, int]] = {}
        for node, value in observed.items():
            more = observed_more[node]
            if isinstance(value, float) and value != more:
                raise ValueError("a number that it computes with depends on the samples")
            if isinstance(value, int | float):
                self.sizes[node] = (value, more - value)
                continue
            if not self.sample_nodes.isdisjoint(node.all_input_nodes):
                self.sample_nodes.add(node)
            if value is None:
                continue
            self.shapes[node] = value
            if node in self.sample_nodes:
                changed = [dim for dim, (size, larger) in enumerate(zip(value, more)) if 3 * size == 2 * larger > 0]
                if len(changed) == 1:
                    self.batches[node] = (changed[0], value[changed[0]] // 2)
        counts = [prod(shape) // 2 for node, shape in self.shapes.items() if node in self.sample_nodes]
        self.largest, self.total = max(counts), sum(counts)  # numbers of one sample in a value, and in all values

    def _readers(self, network: nn.Module) -> dict[fx.Node, str]:
        """The operations that read a weight which nothing else reads, and the weight's name."""
        weights = chain.from_iterable(module._parameters.values() for module in network.modules())
        owners = Counter(map(id, weights))  # a module under two names counts once
        unshared = {id(weight): name for name, weight in network.named_parameters() if owners[id(weight)] == 1}
        readers, live = {}, set(self.nodes)
        for node, path in self.parameters.items():
            name = unshared.get(id(operator.attrgetter(path)(network)))
            users = [user for user in node.users if user in live]
            is_read_once = name and len(users) == 1 and name_of(users[0]) in LAYERS and users[0].args[1] is node
            # A mask cannot replace an entry of a list, or a value computed from parameters.
            if is_read_once and not isinstance(network.get_submodule(name.rpartition(".")[0]), COLLECTIONS):
                readers[users[0]] = name
        return readers

    def _described(self, node: fx.Node, shape: torch.Size, in_order: bool, neurons: tuple[range, range]) -> Layer:
        """Describes an operation that reads a weight, whose neurons have numbers (`joined_neurons`)."""
        is_convolution, (batch, parts) = name_of(node) in CONVOLUTIONS, self.batches[node]
        places = self.shapes[node][2:] if is_convolution else self.shapes[node][:-1]
        positions = prod(places) * parts if is_convolution else prod(places) // 2
        if positions == 1 and not (is_convolution and argument(node, "groups") > 1):
            positions = None
        activation, is_rectified = output_activation(node, {*self.nodes}, self.shapes)
        sources, targets = neurons
        return Layer(node, tuple(shape), activation, is_rectified, batch, parts, in_order, positions, sources, targets)


def is_in_order(two: Tensor, three: Tensor, batch: int, parts: int) -> bool | None:
    """Tells if a dimension holds one sample after the other (True) or one part of all samples after the other (False).

    Args:
        two: values of two samples
        three: values of three, the last two of which are the same
        batch: the dimension
        parts: how many of its entries belong to each sample
    Returns: None if it is neither
    """
    two, three = two.movedim(batch, 0), three.movedim(batch, 0)
    if torch.allclose(three.unflatten(0, (3, parts))[1:], two.unflatten(0, (2, parts)), 1e-3, 1e-4):
        return True
    is_in_parts = torch.allclose(three.unflatten(0, (parts, 3))[:, 1:], two.unflatten(0, (parts, 2)), 1e-3, 1e-4)
    return False if is_in_parts else None


def before_dropout(node: fx.Node) -> fx.Node:
    """The node, or the input of a dropout, which does nothing in evaluation mode."""
    return before_dropout(node.args[0]) if name_of(node) == "dropout" else node


def call(node: fx.Node, arguments: tuple, keywords: dict) -> Any:
    """The value of an operation for its arguments."""
    return node.target(*arguments, **keywords)
