"""A custom model, of the user: its last linear layers, or all of it, as the classifier that masks are made for."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from mimu.model import WeightGraph
from mimu.networks.hooked import HookedClassifier, weight_layers
from mimu.networks.masks import LayerMask, Mask, indexed_in
from mimu.networks.tracing import POOLING, RESHAPING, UNCHANGED, Trace
from mimu.runs.files import InputError, one_line
from mimu.unlearning.samples import AT_ONCE, check_finite_rows

TRIED = 64  # samples on which it is seen what the layers of a model do
TRACED = 2  # samples on which a model is run node by node


class Call(NamedTuple):
    """A module without parts, as a model calls it; of a linear layer, what it was given and what it gave."""

    name: str
    module: nn.Module
    given: Tensor | None = None
    gave: Tensor | None = None


@contextmanager
def plain_torch() -> Iterator[None]:
    """No autocast and no inference mode, in this thread; what all threads share is left as it is."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        with torch.autocast("cuda", enabled=False):
            yield


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, to run and hook: so nothing that a model does to itself is done to the original."""
    model = getattr(model, "_orig_mod", model)  # of one that torch.compile has wrapped: compiled code runs no hooks
    # What is computed from parameters, as by torch.nn.utils.prune, PyTorch does not copy by itself.
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    try:
        copied = copy.deepcopy(model, {id(each): each.detach().clone() for each in computed})
        copied.eval()
    except Exception as error:  # of a custom model, any
        raise InputError(f"model: cannot be copied ({one_line(error)})") from error
    for module in copied.modules():
        module._compiled_call_impl = None
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # on CPUs convolutions and pooling take half of the time
    return copied


@dataclass(frozen=True)
class CustomModel:
    """What of a model masks are made on: the linear layers in a row that it ends in; all, where others are asked for.

    classifier: a copy in float32, masked where the model is, of the layers in a row, or of the whole model, traced
    layers: the indices of its layers among the weight layers of the model; names: of their weights in the model
    masked: which of its layers are to be masked
    inputs: what it is given for all samples, (samples, n) float32, or (samples, ...) as the model takes them
    num_classes: how many logits it gives
    """

    classifier: HookedClassifier
    layers: tuple[int, ...]
    names: tuple[str, ...]
    masked: tuple[int, ...]
    inputs: Tensor
    num_classes: int

    @staticmethod
    def of(
        model: nn.Module, inputs: Tensor, mask_layer: int | Sequence[int] | str | None = "auto", progress: bool = True
    ) -> CustomModel:
        """Takes a model as it is, and looks at what its layers do on a few samples.

        inputs: (samples, ...), as the model takes them but for device and type, which are made those of the model.
        Warns where all layers are to be masked, and a model that cannot be traced has others than those in a row.
        Raises InputError where it gives no logits, is not finite, or a layer of mask_layer cannot be masked.
        """
        check_model(model)
        model = copy_of(model)
        inputs = inputs.to(next(model.parameters()).device)
        index_of, weights = {module: index for index, module in enumerate(weight_layers(model))}, indexed_in(model)
        with torch.no_grad():
            few = torch.linspace(0, len(inputs) - 1, min(TRIED, len(inputs)), dtype=torch.float32).long()
            calls, logits, inputs = calls_of(model, inputs, few)
            check_finite_rows(logits, "logits", ", though inputs and weights are")
            whole, why_not = traced(model, inputs[few[:TRACED]], logits[:TRACED])
            try:
                row = last_in_a_row(calls, logits)
            except InputError:
                if whole is None or not gives_logits(whole.trace, whole.trace.output):
                    raise
                row = []
            in_a_row = [index_of[call.module] for call in row]
            able = in_a_row if whole is None else whole.trace.maskable
            masked = chosen(mask_layer, in_a_row, able)
            if not masked:
                names = {module: name for name, module in model.named_modules()}
                must = ", ".join(f"{index} ({names[module]!r})" for module, index in index_of.items() if index in able)
                which = f"the linear layers in a row that the model ends in ({why_not})" if why_not else "each once"
                raise InputError(f"mask_layer must be auto, None, or some of {must}, {which}; not {mask_layer!r}")
            if why_not and mask_layer is None and len(masked) < len(index_of):
                warnings.warn(f"mask_layer None: of layers {list(masked)} alone, as {why_not}", stacklevel=3)
            if not set(masked) <= set(in_a_row):
                given = inputs.float() if inputs.is_floating_point() else inputs
                return CustomModel(
                    whole, tuple(index_of.values()), tuple(weights.values()), masked, given, logits.shape[1]
                )
            if torch.equal(row[0].given, inputs[few].flatten(1)):
                given = inputs.flatten(1).float()
            else:
                given = prefix_activations(model, row[0].module, inputs, progress)
                check_finite_rows(given, f"what layer {row[0].name!r} is given for inputs")
            places = tuple(sorted(in_a_row.index(index) for index in masked))
            names = tuple(weights[index] for index in in_a_row)
            return CustomModel(copied_layers(row), tuple(in_a_row), names, places, given, logits.shape[1])

    def carried(self, mask: Mask | None, graph: WeightGraph) -> Mask:
        """What a mask on the model, if there is one, switches off in those of its layers that a graph has."""
        carried = mask.by_layer if mask else {}
        found = {}
        for name, layer, shape in zip(graph.names, graph.layers, graph.shapes):
            on_model = carried.get(self.names[layer])
            keep = torch.ones(shape) if on_model is None else on_model.keep
            found[name] = LayerMask.of(keep.to(self.inputs.device, torch.float32))
        return Mask(found)

    def mask(self, mask: Mask) -> Mask:
        """A mask on its layers as one on the model."""
        names = dict(zip(self.classifier.names, self.names))
        return replace(mask, by_layer={names[name]: part for name, part in mask.by_layer.items()})


def chosen(mask_layer: Any, in_a_row: Sequence[int], able: Sequence[int]) -> tuple[int, ...]:
    """The layers to mask, by their indices: all that can be (None), one by default (auto), or those that are named.

    in_a_row: the linear layers in a row that a model ends in; able: all that can be masked, in the order of the calls
    By default, of three in a row or more it is the last but one, which stands between two others as those that the GCN
    was trained on; else the last of all: kernels before it cost the other classes more (docs/networks.md).
    Negative indices count from the last that can be masked. Empty where one that is named cannot be.
    """
    if mask_layer is None:
        return tuple(sorted(able))
    if isinstance(mask_layer, str) and mask_layer == "auto":
        return (in_a_row[-2],) if len(in_a_row) > 2 else ((in_a_row or able)[-1],)
    asked = mask_layer if isinstance(mask_layer, tuple | list) else [mask_layer]
    end = max(able, default=-1) + 1
    found = {index + end if index < 0 else index for index in asked if type(index) is int}  # a bool is no index
    return tuple(sorted(found)) if len(found) == len(asked) and found <= set(able) else ()


def check_model(model: nn.Module) -> None:
    """Raises InputError where a model is none, has no layer to mask, or holds numbers that are not finite."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not weight_layers(model):
        has = f"{type(model).__name__} has none"
        raise InputError(f"model must have layers of torch.nn.Linear, or of Conv2d without groups: {has}")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise InputError(f"model: {name} has no numbers yet (lazy, or on the device meta)")
        if not value.detach().isfinite().all():
            raise InputError(f"model: {name} has numbers that are not finite")


def traced(model: nn.Module, example: Tensor, logits: Tensor) -> tuple[HookedClassifier | None, str]:
    """A copy of a whole model in float32, and ""; or None, and why there is none.

    example: some inputs; logits: what the model gives for them
    """
    model = copy_of(model.network if isinstance(model, HookedClassifier) else model).float()
    if (mask := Mask.on(model)) is not None:
        mask.apply(model, permanent=True)
    example = example.float() if example.is_floating_point() else example
    try:
        classifier = HookedClassifier(model, example)
        classifier.record(example, example.new_zeros(len(example), dtype=torch.int64), classifier.trace.maskable)
        return (classifier, "") if is_close(classifier(example), logits) else (None, "in float32 it gives other logits")
    except Exception as error:  # of a custom model, any
        return None, f"it cannot be run node by node: {one_line(error)}"


def gives_logits(trace: Trace, node: fx.Node) -> bool:
    """Whether nothing but pooling stands between a weight layer and a node: no softmax."""
    if node in trace.calls or trace.names[node] not in POOLING | RESHAPING | UNCHANGED:
        return node in trace.calls
    return gives_logits(trace, node.all_input_nodes[0])


def is_close(found: Tensor, logits: Tensor) -> bool:
    """Whether the logits of a copy in float32 are those of the model, but for its precision."""
    is_precise = logits.dtype in (torch.float32, torch.float64)
    return torch.allclose(found, logits.float(), rtol=1e-3 if is_precise else 5e-2, atol=1e-4 if is_precise else 5e-2)


def calls_of(model: nn.Module, inputs: Tensor, chosen: Tensor) -> tuple[list[Call], Tensor, Tensor]:
    """What modules without parts a model calls, in their order, its logits on chosen inputs, and all as it takes them.

    Inputs of another type than it takes are given in that of its parameters. Raises InputError where it fails.
    """
    calls: list[Call] = []

    def note(name: str, module: nn.Module, arguments: tuple, named: dict, gave: Tensor) -> None:
        if isinstance(module, nn.Linear):
            (given,) = (*arguments, *named.values())
            calls.append(Call(name, module, given.clone(), gave.clone()))
        else:
            calls.append(Call(name, module))

    types = dict.fromkeys([inputs.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())])
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or not any(module.children()):
                hooks.callback(module.register_forward_hook(partial(note, name), with_kwargs=True).remove)
        failed = None
        for dtype in types:
            calls.clear()
            try:
                logits = model(inputs[chosen].to(dtype))
                break
            except Exception as error:  # of a custom model, any
                failed = failed or error
        else:
            about = f"inputs of shape {tuple(inputs[chosen].shape)} and {inputs.dtype}"
            raise InputError(f"model: fails on {about} ({one_line(failed)})") from failed
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(chosen):
        has = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, a tensor ({len(chosen)}, classes) for such inputs, not {has}")
    if dtype != inputs.dtype and not inputs.is_floating_point():
        span = f"from {inputs.min().item()} to {inputs.max().item()}"
        warnings.warn(f"inputs are {inputs.dtype}, {span}, but the model takes {dtype}: are they scaled?", stacklevel=4)
    return calls, logits, inputs.to(dtype)


def last_in_a_row(calls: list[Call], logits: Tensor) -> list[Call]:
    """The linear layers that a model ends in, each of which is given what the one before gave, through a ReLU."""
    times = Counter(call.module for call in calls)
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    if not linear or not torch.equal(linear[-1].gave, logits):
        ends = "a computation outside of its modules"
        if calls and not isinstance(calls[-1].module, nn.Linear):
            ends = f"layer {calls[-1].name!r}: {type(calls[-1].module).__name__}"
        ways = "give it without, for instance without a softmax (a Linear that is not called does not count)"
        raise InputError(f"model must end in a linear layer that gives the logits, but ends in {ends}: {ways}")
    *before, last = linear
    if times[last.module] > 1:
        raise InputError(f"layer {last.name!r} is called {times[last.module]} times: masks need one that is once")
    row = [last]
    for call in reversed(before):
        if times[call.module] > 1 or not torch.equal(call.gave.relu(), row[0].given):
            break
        row.insert(0, call)
    if not is_close(copied_layers(row)(row[0].given.float()), logits):
        names = ", ".join(repr(call.name) for call in row)
        raise InputError(f"layers {names} do more than linear layers do: their copy gives other logits")
    return row


def prefix_activations(model: nn.Module, layer: nn.Module, inputs: Tensor, progress: bool) -> Tensor:
    """What a layer of a model is given for all inputs, (samples, n) float32."""
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args, named: given.extend([*args, *named.values()]), with_kwargs=True)
    for batch in tqdm(inputs.split(AT_ONCE), "samples", delay=1, leave=False, disable=None if progress else True):
        model(batch)
    return torch.cat(given).float()


def copied_layers(row: list[Call]) -> HookedClassifier:
    """The layers in float32, with the weights that they have under what is put on them."""
    modules: list[nn.Module] = [nn.Flatten()]
    for call in row:
        m, n = call.module.weight.shape
        layer = nn.Linear(n, m, device="meta")  # without drawing weights
        layer.weight = nn.Parameter(call.module.weight.detach().float().clone())
        layer.bias = None if call.module.bias is None else nn.Parameter(call.module.bias.detach().float().clone())
        modules += [layer, nn.ReLU()]
    return HookedClassifier(nn.Sequential(*modules[:-1]), row[0].given[:TRACED].flatten(1).float())
