"""Operations of an exported network: the export, their names, and what they do to neurons and samples."""

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

# Names of operations of PyTorch's ATen.
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
LAYERS = {"linear"} | CONVOLUTIONS
NORMALISATIONS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
# Operations that compute each number from the number at the same place, but have no tag that says so.
ELEMENTWISE = {"dropout", "feature_dropout", "to", "contiguous", "hardswish", "prelu"}
RESHAPING = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
REDUCING = {"mean", "sum", "amax", "amin"}
OVER_PLACES = ("max_pool", "avg_pool", "adaptive_", "upsample_", "pad", "constant_pad")  # prefixes of names
RECTIFIERS = {"relu", "leaky_relu", "hardtanh"}  # relu6 is a hardtanh
SMOOTH = {"gelu", "silu", "elu", "celu", "softplus", "tanh", "sigmoid", "hardswish", "mish", "prelu"}
# These may stand between a layer and its activation function.
CARRYING = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "add", "sub", "mul", "dropout", "clone", "to"}
Shapes = Mapping[fx.Node, torch.Size]  # of the tensors in a graph
EXPORTING = threading.Lock()  # torch.export is not made for several threads at once


def name_of(node: fx.Node) -> str:
    """The name of an operation without its overload, such as `conv2d`, `relu` or `getitem`."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else getattr(node.target, "__name__", "")


def argument(node: fx.Node, name: str) -> Any:
    """The value of an operation's argument, or its default."""
    for place, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, each.default_value)
    return None


def joined_neurons(nodes: Sequence[fx.Node], shapes: Shapes) -> dict[fx.Node, tuple[range, range]]:
    """Numbers the neurons of a network: for each linear operation and convolution those that it reads and gives.

    A layer reads the neurons of another one if its input comes from that layer's output through operations that leave
    neurons apart (`keeps_neurons`). If such an operation reads the outputs of several layers, as a residual addition
    does, their neurons are the same. Any other operation, such as attention, ends the chain: a layer that comes after
    it reads neurons of its own.

    Args:
        nodes: the operations whose values depend on the samples, in the order in which they run
    """
    numbers: dict[tuple[fx.Node, int], range] = {}  # of the neurons in a dimension of a value
    count = 0
    for node in nodes:
        shape = shapes.get(node, ())
        if name_of(node) in LAYERS:
            dim = neuron_dim(node, shape)
            numbers[node, dim] = range(count, count + shape[dim])
            count += shape[dim]
            continue
        operation = node.args[0] if name_of(node) == "getitem" else node  # pooling may give indices beside values
        for dim in {1, len(shape) - 1}:
            for each in operation.all_input_nodes:
                neurons = numbers.get((each, dim))
                if neurons and keeps_neurons(operation, dim, shapes[each], shape):
                    first = numbers.setdefault((node, dim), neurons)
                    if first != neurons and len(first) == len(neurons):
                        numbers = {key: first if each == neurons else each for key, each in numbers.items()}
    joined: dict[fx.Node, tuple[range, range]] = {}
    for node in nodes:
        if name_of(node) in LAYERS and (value := node.args[0]) in shapes:
            dim = neuron_dim(node, shapes[value])
            sources = numbers.setdefault((value, dim), range(count, count + shapes[value][dim]))
            count = max(count, sources.stop)
            joined[node] = sources, numbers[node, neuron_dim(node, shapes[node])]
    return joined


def neuron_dim(layer: fx.Node, shape: torch.Size) -> int:
    """The dimension of a layer's input or output that holds neurons, or the channels of a convolution."""
    return 1 if name_of(layer) in CONVOLUTIONS else len(shape) - 1


def keeps_neurons(node: fx.Node, dim: int, before: torch.Size, shape: torch.Size) -> bool:
    """True if each entry of a dimension becomes one entry of the output's, or several neighbouring ones.

    Elementwise functions, normalisation, pooling, means over later dimensions and flattening of these do so.

    Args:
        dim: the dimension
        before: the shape of the operation's input
        shape: the shape of its output
    """
    name = name_of(node)
    if name in RESHAPING:
        return len(before) > dim and before[:dim] == shape[:dim] and shape[dim] % before[dim] == 0
    if name in REDUCING:
        return min(each % len(before) for each in argument(node, "dim") or [0]) > dim
    if name.startswith(OVER_PLACES):
        return len(before) > dim + 1 and before[: dim + 1] == shape[: dim + 1]
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return before == shape and (is_pointwise or name in NORMALISATIONS | ELEMENTWISE)


def output_activation(layer: fx.Node, nodes: Collection[fx.Node], shapes: Shapes) -> tuple[fx.Node, bool]:
    """The node of a layer's output activation, after normalisation and addition, and whether it is rectified.

    nodes: those that the network's output needs
    """
    node = layer
    while len(users := [each for each in node.users if each in nodes]) == 1:
        name = name_of(users[0])
        if shapes.get(users[0]) != shapes[node] or name not in RECTIFIERS | SMOOTH | CARRYING:
            break
        node = users[0]
        if name not in CARRYING:
            return node, name in RECTIFIERS
    return layer, False


def exported(network: nn.Module, example: Tensor) -> ExportedProgram:
    """Exports the operations of a network for any number of samples, none of them in place."""
    with EXPORTING, torch.enable_grad():  # without gradients nn.TransformerEncoderLayer is one operation
        program = export(network, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        in_place = [node for node in program.graph.nodes if is_in_place(node)]
        if any(has_views(node.args[0]) for node in in_place):
            program = program.run_decompositions({})  # takes as long as the export
        for node in filter(is_in_place, program.graph.nodes):
            plain = getattr(torch.ops.aten, name_of(node).removesuffix("_"))
            node.target = getattr(plain, node.target._overloadname)
    for node in program.graph.nodes:
        if name_of(node) == "_native_batch_norm_legit_no_training":  # back to the operation with a single value
            (first,) = [user for user in node.users if user.args[1] == 0]
            *inputs, momentum, eps = node.args
            first.target, first.args = torch.ops.aten.batch_norm.default, (*inputs, False, momentum, eps, True)
        elif name_of(node) == "copy":  # which has no derivative
            node.target, node.args, node.kwargs = torch.ops.aten.expand_as.default, node.args[1::-1], {}
    return program


def is_in_place(node: fx.Node) -> bool:
    """True if an operation changes its input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def has_views(node: fx.Node) -> bool:
    """True if a value may share its memory with another one."""
    return any(is_view(each) and not is_in_place(each) for each in (node, *node.users))


def is_view(node: fx.Node) -> bool:
    """True if an operation's output may share its memory with the input."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return name_of(node) == "getitem"  # of several tensors, which may be views of one
    return name_of(node) != "to" and any(each.alias_info is not None for each in schema.returns)
