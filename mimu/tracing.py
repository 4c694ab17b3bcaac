"""A network exported as a graph of operations, run under other weights, begun midway and recorded."""

from __future__ import annotations

import copy
import operator
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from mimu.errors import one_line
from mimu.layers import CONVOLUTIONS, Ends, Layer, LayerRecord, Neurons, Record, argument, is_moving, name_of
from mimu.wrapping import COLLECTIONS, Wrapper

RECTIFIERS = {"relu", "leaky_relu", "hardtanh"}  # relu6 is a hardtanh
SMOOTH = {"gelu", "silu", "elu", "celu", "softplus", "tanh", "sigmoid", "hardswish", "mish", "prelu"}
# What may stand between a layer and its activation function.
CARRYING = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "add", "sub", "mul", "dropout", "clone", "to"}
PROBABILITIES = {"softmax", "sigmoid"}  # which are no logits
EXPORTING = threading.Lock()  # torch.export is not made for several threads at once


class Trace:
    """A network as the operations of a graph (torch.export), in evaluation mode, for any number of samples.

    layers: the weights that one linear operation or convolution reads, and nothing else, by their names, in the order
        of `named_parameters`; ends: the neurons that each joins
    given: the nodes that stand for what the network is given, here one; output: that of the logits
    of_samples: the nodes whose values depend on what the network is given; others are the same for all samples
    Raises ValueError where the network cannot be exported, or gives other logits than its operations.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        """example: some samples, on two of which the network is run."""
        try:
            two, three = example[[0, -1]], example[[-1, 0, -1]]
            program = exported(network, two)
            signature = program.graph_signature
            by_name = {node.name: node for node in program.graph.nodes}
            names = signature.inputs_to_parameters | signature.inputs_to_buffers
            constants = signature.inputs_to_lifted_tensor_constants
            first = {id(weight): name for name, weight in network.named_parameters()}
            first_names = {name: first.get(id(operator.attrgetter(name)(network)), name) for name in names.values()}
            self.parameters = {by_name[node]: first_names[name] for node, name in names.items()}
            self.constants = {by_name[node]: program.constants[name] for node, name in constants.items()}
            self.input_nodes = (by_name[signature.user_inputs[0]],)
            self.output = by_name[signature.user_outputs[0]]
            self.module = program.graph_module
            self.sizes: dict[fx.Node, tuple[int, int]] = {}  # whole numbers: for two samples, and more for one more
            self._plan()
            self._look(network, two, three)
        except Exception as error:  # of a model of the user's own
            raise ValueError(f"torch.export cannot take it for any number of samples ({one_line(error)})") from error
        self._plan()

    def __deepcopy__(self, memo: dict) -> Trace:
        return self

    def suffix_from(self, layers: Sequence[str]) -> Trace:
        """The same from `start_of` layers on, whose value it is then given in the place of images."""
        return self._suffix([self.start_of(layers)])

    def suffix_after(self, layer: str) -> Trace:
        """The same from behind a layer on, given what it gives and all other values of samples that the rest needs.

        Raises ValueError where the samples are not in front of each.
        """
        node = self.layers[layer].node
        alive = next({*alive} for each, alive in self._alive() if each is node)
        if any(self.batches.get(each) != (0, 1) for each in alive):
            raise ValueError(f"behind {layer} values have no dimension of samples in front")
        return self._suffix([node, *(alive - {node})])

    def _suffix(self, nodes: Sequence[fx.Node]) -> Trace:
        begun = copy.copy(self)
        begun.input_nodes = tuple(nodes)
        begun._plan()
        return begun

    def run(
        self,
        network: nn.Module,
        value: Tensor | Sequence[Tensor],
        compute: Callable[[fx.Node, tuple, dict], Any] | None = None,
        watched: Sequence[fx.Node] = (),
        end: fx.Node | None = None,
        is_constant: bool = False,
    ) -> dict[fx.Node, Any]:
        """The values of the output and of `watched` nodes.

        value: what it is given, one for each node of `given`
        compute: gives the value of an operation from its arguments; end: the node to stop at
        is_constant: whether the weights are left out of the autograd graph
        """
        given = [value] if isinstance(value, Tensor) else value
        values: dict[fx.Node, Any] = dict(zip(self.input_nodes, given))
        keep = {self.output, end, *watched}
        for node in self.nodes:
            if node in self.parameters:
                weight = operator.attrgetter(self.parameters[node])(network)
                values[node] = weight.detach() if is_constant else weight
            elif node in self.constants:
                values[node] = self.constants[node].to(given[0].device)
            elif node in self.sizes:
                of_two, more = self.sizes[node]
                values[node] = of_two + more * (len(given[0]) - 2)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self.module)  # of operations in no_grad, for one
            elif node not in values:
                arguments, named = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = (compute or call)(node, arguments, named)
            for spent in self._last_uses[node]:
                if spent not in keep:
                    del values[spent]
            if node is end:
                break
        return values

    def start_of(self, layers: Sequence[str]) -> fx.Node:
        """The last node before all of these layers whose value, samples in front, is all that the rest needs."""
        names, (start,) = self.called, self.input_nodes
        for node, alive in self._alive():
            if names.get(node) in layers:
                break
            if len(alive) == 1 and self.batches.get(single := next(iter(alive))) == (0, 1):
                start = single
        return start

    def _alive(self) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
        """Every node, and the nodes of samples whose values the rest needs once it has been computed."""
        alive: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.of_samples:
                alive.add(node)
            alive.difference_update(self._last_uses[node])
            yield node, alive

    @property
    def called(self) -> dict[fx.Node, str]:
        """The names of the layers in the order in which they are called, by their operations."""
        names = {layer.node: name for name, layer in self.layers.items()}
        return {node: names[node] for node in self.nodes if node in names}

    @property
    def representation(self) -> fx.Node:
        """What the last layer is given; the output itself where the network does not end in a linear layer."""
        is_last = any(layer.node is self.output and layer.positions is None for layer in self.layers.values())
        return self.output.args[0] if is_last else self.output

    @property
    def names_at_the_end(self) -> list[str]:
        """The linear layers of features in a row that it ends in, a ReLU between two; without any its last layer."""
        names, node = self.called, self.output
        row: list[str] = []
        while node in names and self.layers[names[node]].positions is None:
            row.insert(0, names[node])
            node = behind_dropout(node.args[0])
            if name_of(node) != "relu":
                break
            node = behind_dropout(node.args[0])
        return row or [*names.values()][-1:]

    @property
    def why_no_logits(self) -> str:
        """Why the output cannot be logits, in words, or ""."""
        layers, behind = {*self.called}, {self.output}
        for node in reversed(self.nodes):
            if node in behind - layers:
                if name_of(node) in PROBABILITIES:
                    return f"ends in a {name_of(node)}: give it without"
                behind |= self.of_samples.intersection(node.all_input_nodes)
        return "" if behind & layers else "ends in no layer that can be masked"

    def _plan(self) -> None:
        """Finds the nodes that the output takes from what is given on, and those that are spent after each."""
        wanted, begin = {*self.input_nodes, self.output}, {*self.input_nodes, *self.sizes}
        for node in reversed(self.output.graph.nodes):
            if node in wanted and node not in begin:
                wanted.update(node.all_input_nodes)
        self.nodes = [node for node in self.output.graph.nodes if node in wanted]
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node not in begin:
                last.update(dict.fromkeys(node.all_input_nodes, node))
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, user in last.items():
            self._last_uses[user].append(node)

    @torch.no_grad()
    def _look(self, network: nn.Module, two: Tensor, three: Tensor) -> None:
        """Runs it on two samples and on three, and sees what depends on them, and which neurons its layers join.

        batches: of a node of samples, the dimension that holds them, and how many parts of each
        """
        self.of_samples, neurons = {*self.input_nodes}, Neurons()
        readers = self._readers(network)
        seen: list[dict[fx.Node, Any]] = []
        given: list[dict[fx.Node, Tensor]] = []

        def note(node: fx.Node, arguments: tuple, named: dict) -> Any:
            value = call(node, arguments, named)
            if isinstance(value, Tensor | int | float):
                seen[-1][node] = value.shape if isinstance(value, Tensor) else value
            if node in readers and node.args[0] in self.of_samples and 2 not in seen[0][node.args[0]][:2]:
                given[-1][node] = arguments[0]  # parts of samples, it may be
            if len(seen) == 1:
                is_of_samples = isinstance(value, Tensor | tuple | list)
                if is_of_samples and not self.of_samples.isdisjoint(node.all_input_nodes):
                    self.of_samples.add(node)
                neurons.follow(node, value, node in self.of_samples)
            return value

        logits = []
        for x in (two, three):
            seen.append(dict.fromkeys(self.input_nodes, x.shape))
            given.append({})
            if len(seen) == 1:
                neurons.follow(*self.input_nodes, x, True)
            logits.append(self.run(network, x, note)[self.output])
        is_as_exported = torch.allclose(logits[0], network(two), 1e-3, 1e-4, equal_nan=True)
        if not is_as_exported or not torch.allclose(logits[1][1:], logits[0], 1e-2, 1e-3, equal_nan=True):
            raise ValueError("its operations, one after the other, give other logits than itself")
        self.batches: dict[fx.Node, tuple[int, int]] = {}
        self.shapes, counts = seen[0], []
        for node, shape in seen[0].items():
            more = seen[1][node]
            if isinstance(shape, float) and shape != more:
                raise ValueError("a number that it computes with depends on the samples")
            if isinstance(shape, int | float):
                self.sizes[node] = (shape, more - shape)
            elif node in self.of_samples and isinstance(shape, torch.Size):
                counts.append(prod(shape) // 2)
                changed = [dim for dim, (size, larger) in enumerate(zip(shape, more)) if 3 * size == 2 * larger > 0]
                if len(changed) == 1:
                    self.batches[node] = (changed[0], shape[changed[0]] // 2)
        self.largest, self.total = max(counts), sum(counts)
        ends, nodes = neurons.resolved(), {name: node for node, name in readers.items()}
        self.layers: dict[str, Layer] = {}
        self.ends: list[Ends] = []
        for name, weight in network.named_parameters():
            node = nodes.get(name)
            batch = self.batches.get(node)
            # As what it is given has them; linear layers on all tokens of all samples in one row are given parts.
            if batch is not None and self.batches.get(node.args[0]) == batch:
                in_order = node not in given[0] or is_in_order(given[0][node], given[1][node], *batch)
                if in_order is not None:
                    self.layers[name] = self._layer(node, weight.shape, in_order)
                    self.ends.append(ends[node])

    def _readers(self, network: nn.Module) -> dict[fx.Node, str]:
        """The operations that read a weight which nothing else reads, and its name."""
        of_modules = chain.from_iterable(module._parameters.values() for module in network.modules())
        owners = Counter(map(id, of_modules))  # a module under two names is one
        own = {name for name, weight in network.named_parameters() if owners[id(weight)] == 1}
        readers, live = {}, set(self.nodes)
        for weight, name in self.parameters.items():
            users = [node for node in weight.users if node in live]
            is_read_once = name in own and len(users) == 1 and name_of(users[0]) in {"linear"} | CONVOLUTIONS
            owner = network.get_submodule(name.rpartition(".")[0])
            # Of lists and of what is computed from parameters no mask can take the place.
            if is_read_once and users[0].args[1] is weight and not isinstance(owner, COLLECTIONS):
                readers[users[0]] = name
        return readers

    def _layer(self, node: fx.Node, shape: torch.Size, in_order: bool) -> Layer:
        """What there is to know of an operation that reads a weight."""
        is_convolution, (batch, parts) = name_of(node) in CONVOLUTIONS, self.batches[node]
        of_places = self.shapes[node][2:] if is_convolution else self.shapes[node][:-1]
        positions = prod(of_places) * parts if is_convolution else prod(of_places) // 2
        is_single = positions == 1 and not (is_convolution and argument(node, "groups") > 1)
        activation, is_rectified = self._activation(node)
        positions = None if is_single else positions
        return Layer(node, tuple(shape), activation, is_rectified, batch, parts, in_order, positions)

    def _activation(self, layer: fx.Node) -> tuple[fx.Node, bool]:
        """The node of a layer's output activation, behind normalisation and addition, and whether it is rectified."""
        node, live = layer, set(self.nodes)
        while len(users := [each for each in node.users if each in live]) == 1:
            name = name_of(users[0])
            if self.shapes.get(users[0]) != self.shapes[node] or name not in RECTIFIERS | SMOOTH | CARRYING:
                break
            node = users[0]
            if name not in CARRYING:
                return node, name in RECTIFIERS
        return layer, False


def behind_dropout(node: fx.Node) -> fx.Node:
    """The node, or what a dropout is given, which does nothing in evaluation mode."""
    return behind_dropout(node.args[0]) if name_of(node) == "dropout" else node


def is_in_order(two: Tensor, three: Tensor, batch: int, parts: int) -> bool | None:
    """Whether a dimension has one sample after the other, by the values of two, the last of three.

    Not where it has one part of all samples after the other; None where it has neither.
    """
    two, three = two.movedim(batch, 0), three.movedim(batch, 0)
    if torch.allclose(three.unflatten(0, (3, parts))[1:], two.unflatten(0, (2, parts)), 1e-3, 1e-4):
        return True
    is_in_parts = torch.allclose(three.unflatten(0, (parts, 3))[:, 1:], two.unflatten(0, (parts, 2)), 1e-3, 1e-4)
    return False if is_in_parts else None


def exported(network: nn.Module, example: Tensor) -> ExportedProgram:
    """The operations of a network, none of them in place, for any number of samples. Raises whatever is wrong."""
    with EXPORTING, torch.enable_grad():  # without gradients nn.TransformerEncoderLayer is one operation
        program = export(network, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        in_place = [node for node in program.graph.nodes if is_in_place(node)]
        if all(is_alone(node.args[0]) for node in in_place):
            for node in in_place:
                plain = getattr(torch.ops.aten, name_of(node).removesuffix("_"))
                node.target = getattr(plain, node.target._overloadname)
        else:
            program = program.run_decompositions({})  # takes as long as the export
    for node in program.graph.nodes:
        if name_of(node) == "_native_batch_norm_legit_no_training":  # as it was, one value
            (first,) = [user for user in node.users if user.args[1] == 0]
            first.target, (*given, momentum, eps) = torch.ops.aten.batch_norm.default, node.args
            first.args = (*given, False, momentum, eps, True)
        elif name_of(node) == "copy":  # which has no derivative
            node.target, node.args, node.kwargs = torch.ops.aten.expand_as.default, node.args[1::-1], {}
    return program


def is_in_place(node: fx.Node) -> bool:
    """Whether an operation changes what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_alone(node: fx.Node) -> bool:
    """Whether no other value may lie at the same place in memory."""
    return not any(is_moving(each) and not is_in_place(each) for each in (node, *node.users))


def call(node: fx.Node, arguments: tuple, named: dict) -> Any:
    """What an operation gives for its arguments."""
    return node.target(*arguments, **named)


Layers = Sequence[int]  # by their indices among the weight layers
NUMBERS_AT_ONCE = 2**26  # of float32 in the tensors of a pass over samples, which then takes some 256 MB


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class HookedClassifier(Wrapper):
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
        self._is_suffix = False

    @property
    def weights(self) -> list[Tensor]:
        """Those of the layers, as they are under a mask."""
        return [operator.attrgetter(name)(self.network) for name in self.names]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight, in the order of the layers: (out, in), or that of kernels."""
        return [layer.shape for layer in self.trace.layers.values()]

    def suffix_from(self, layers: Layers) -> HookedClassifier:
        """The same network, which is given `prefix_activations` of the layers in the place of images."""
        return self._suffix(self.trace.suffix_from([self.names[layer] for layer in layers]))

    def suffix_after(self, layer: int) -> HookedClassifier:
        """The same network, whose `outputs` are given what `recorded` gives of a layer in the place of images."""
        return self._suffix(self.trace.suffix_after(self.names[layer]))

    def _suffix(self, trace: Trace) -> HookedClassifier:
        begun = copy.copy(self)
        begun.trace, begun._is_suffix = trace, True
        return begun

    @torch.no_grad()
    def recorded(self, layer: int, images: Tensor, directions: Tensor) -> tuple[list[Tensor], Tensor]:
        """What stands for images behind a layer, what the layer gives first, and how much of directions it reads.

        Shapes: directions (rank, ...) as the weight, to (batch, rank, ...); of a linear layer (batch, ..., rank)
        Raises ValueError where `Trace.suffix_after` does.
        """
        node, watched = (
            self.trace.layers[self.names[layer]].node,
            self.trace.suffix_after(self.names[layer]).input_nodes,
        )
        parts = []
        for part in images.split(self.samples_at_once):
            values = self.trace.run(self.network, part, watched=[*watched, node.args[0]], end=node)
            read = node.target(values[node.args[0]], directions, None, *node.args[3:])
            parts.append([*(values[each] for each in watched), read])
        *values, read = map(torch.cat, zip(*parts))
        return values, read

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        run = (lambda x: self.outputs(x)[1]) if self._is_suffix else self.network
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
    def record(self, images: Tensor, labels: Tensor, layers: Layers, excluded_classes: Sequence[int] = ()) -> Record:
        """What `layers` do on a batch: a forward pass, and a backward one as far as their pre-activations.

        labels: (samples); excluded_classes: as `log_odds` takes it
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
        found = log_odds(values[trace.output], labels, excluded_classes)
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


def log_odds(logits: Tensor, labels: Tensor, excluded_classes: Sequence[int] = ()) -> Tensor:
    """log(p / (1 - p)) of every label, p the softmax of the logits (samples, classes), (samples).

    excluded_classes: classes without which the samples of others are seen, their softmax restricted to the rest
    """
    others = logits.scatter(1, labels[:, None], float("-inf"))
    if len(excluded_classes):
        is_left_out = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_left_out[list(excluded_classes)] = True
        others = others.masked_fill(is_left_out & ~is_left_out[labels][:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)
