"""The last linear layers of a model of the user's own, as the classifier that masks are made for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import HookedMNISTClassifier, Mask, WeightGraph, WeightMask, linear_layers
from own.samples import AT_ONCE, check_finite_rows
from runs.files import InputError, one_line

TRIED = 64  # samples on which a model is looked at
PASSING = (nn.Linear, nn.ReLU, nn.Flatten, nn.Dropout, nn.Identity, WeightMask)  # what may stand between linear layers


class Call(NamedTuple):
    """A module without parts, as a model calls it, and of a linear layer, what it was given and gave."""

    name: str
    module: nn.Module
    given: Tensor | None
    gave: Tensor | None


@contextmanager
def plain_torch() -> Iterator[None]:
    """No autocast, no inference mode, float32 by default; and PyTorch's random state as it was, when it is left."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as off:
        for device in ("cpu", "cuda"):
            off.enter_context(torch.autocast(device, enabled=False))
        off.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, to run and hook: so nothing that a model does to itself is done to the original."""
    model = getattr(model, "_orig_mod", model)  # of one that torch.compile has wrapped: compiled code runs no hooks
    # What is computed from parameters, as by torch.nn.utils.prune, PyTorch does not copy by itself.
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    try:
        copied = copy.deepcopy(model, {id(each): each.detach().clone() for each in tensors if not each.is_leaf})
    except Exception as error:  # of a model of the user's own
        raise InputError(f"model: cannot be copied ({one_line(error)})") from error
    for module in copied.modules():
        module._compiled_call_impl = None
    return copied.eval()


@dataclass(frozen=True)
class OwnClassifier:
    """The linear layers with ReLU between them that a model ends in, taken as a classifier of what they are given.

    classifier: a copy of these layers in float32, masked where the model is
    layers: which of the linear layers of the model they are; names: as the model calls them
    inputs: what they are given for all samples, (samples, n) float32
    before: the module that stands before them, in words
    """

    classifier: HookedMNISTClassifier
    layers: tuple[int, ...]
    names: tuple[str, ...]
    inputs: Tensor
    before: str

    @staticmethod
    def of(model: nn.Module, inputs: Tensor, progress: bool = True) -> OwnClassifier:
        """Takes a model as it is, and looks at what its linear layers do on a few samples.

        inputs: (samples, ...), as the model takes them but for device and type, which are made those of the model.
        Raises InputError where it does not end in a linear layer, or is not finite.
        """
        check_model(model)
        model = copy_of(model)
        inputs = inputs.to(next(model.parameters()).device)
        with torch.no_grad():
            spread = torch.linspace(0, len(inputs) - 1, min(TRIED, len(inputs))).long()
            calls, logits, inputs = calls_of(model, inputs, spread)
            check_finite_rows(logits, "logits", ", though inputs and weights are")
            chain = last_in_a_row(calls, logits)
            first = next(place for place, call in enumerate(calls) if call is chain[0])
            before = [call for call in calls[:first] if not isinstance(call.module, PASSING)]
            if torch.equal(chain[0].given, inputs[spread].flatten(1)):
                given = inputs.flatten(1).float()
            else:
                given = given_to(chain[0].module, model, inputs, progress)
                check_finite_rows(given, f"what layer {chain[0].name!r} is given for inputs")
            classifier = copied_layers(chain)
        close = (1e-3, 1e-4) if logits.dtype in (torch.float32, torch.float64) else (5e-2, 5e-2)
        if not torch.allclose(classifier(given[spread]), logits.float(), *close):
            names = ", ".join(repr(call.name) for call in chain)
            raise InputError(f"layers {names} do more than linear layers do: their copy gives other logits")
        all_layers = {module: index for index, module in enumerate(linear_layers(model))}
        positions, names = (tuple(all_layers[call.module] for call in chain), tuple(call.name for call in chain))
        return OwnClassifier(classifier, positions, names, given, described(before[-1:]) or "its inputs")

    def chosen(self, mask_layer: int | tuple[int, ...] | list[int] | str | None) -> tuple[int, ...]:
        """Which of its own layers to mask: all by None, others by their indices among the model's linear layers.

        auto: the last but one where it stands between two others, as those that the GCN was trained on; else the last.
        """
        count = len(self.layers)
        if mask_layer is None:
            return tuple(range(count))
        if isinstance(mask_layer, str) and mask_layer == "auto":
            return (count - 2,) if count > 2 else (count - 1,)
        asked = list(mask_layer) if isinstance(mask_layer, tuple | list) else [mask_layer]
        last = max(self.layers)
        by_index = {index: position for position, index in enumerate(self.layers)}
        by_index |= {index - last - 1: position for index, position in by_index.items()}
        found = {by_index[index] for index in asked if type(index) is int and index in by_index}
        if not found or len(found) < len(asked):
            named = ", ".join(f"{index} ({name!r})" for index, name in zip(self.layers, self.names))
            raise InputError(
                f"mask_layer must be auto, None, or some of {named}, the linear layers that the model ends in, with "
                f"ReLU between them, behind {self.before}; not {mask_layer!r}"
            )
        return tuple(sorted(found))

    def carried(self, mask: Mask | None, graph: WeightGraph) -> Mask:
        """What a mask on the model, if there is one, switches off in those of its layers that a graph has."""
        keep = dict(zip(mask.layers, mask.keep)) if mask else {}
        own = [keep.get(self.layers[layer], torch.ones(shape)) for layer, shape in zip(graph.layers, graph.shapes)]
        return Mask(graph.layers, tuple(part.to(self.inputs) for part in own))

    def mask(self, mask: Mask) -> Mask:
        """A mask on its layers as one on the model."""
        return replace(mask, layers=tuple(self.layers[layer] for layer in mask.layers))


def check_model(model: nn.Module) -> None:
    """Raises InputError where a model is none, has no linear layer, or holds numbers that are not finite."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not linear_layers(model):
        raise InputError(f"model must end in layers of torch.nn.Linear: {type(model).__name__} has none")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise InputError(f"model: {name} has no numbers yet (lazy, or on the device meta)")
        if not value.isfinite().all():
            raise InputError(f"model: {name} has numbers that are not finite")


def calls_of(model: nn.Module, inputs: Tensor, chosen: Tensor) -> tuple[list[Call], Tensor, Tensor]:
    """What modules without parts a model calls, in their order, its logits on chosen inputs, and all as it takes them.

    Inputs of another type than it takes are given in that of its parameters. Raises InputError where it fails.
    """
    calls: list[Call] = []

    def call(name: str, module: nn.Module, given: tuple, named: dict, gave: Tensor) -> None:
        pair = (given_by(given, named).clone(), gave.clone()) if isinstance(module, nn.Linear) else (None, None)
        calls.append(Call(name, module, *pair))

    types = dict.fromkeys([inputs.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())])
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if any(module.children()) and not isinstance(module, nn.Linear):
                continue
            hook = module.register_forward_hook(lambda *given, name=name: call(name, *given), with_kwargs=True)
            hooks.callback(hook.remove)
        failed = None
        for dtype in types:
            calls.clear()
            try:
                logits = model(inputs[chosen].to(dtype))
                break
            except Exception as error:  # of a model of the user's own
                failed = failed or error
        else:
            about = f"inputs of shape {tuple(inputs[chosen].shape)} and {inputs.dtype}"
            raise InputError(f"model: fails on {about} ({one_line(failed)})") from failed
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(chosen):
        has = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, a tensor ({len(chosen)}, classes) for such inputs, not {has}")
    return calls, logits, inputs.to(dtype)


def given_by(arguments: tuple, named: dict) -> Tensor:
    """What a linear layer is called with."""
    return arguments[0] if arguments else named["input"]


def last_in_a_row(calls: list[Call], logits: Tensor) -> list[Call]:
    """The linear layers that a model ends in, each of which is given what the one before gave, through a ReLU."""
    times = Counter(call.module for call in calls)
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    if not linear or not torch.equal(linear[-1].gave, logits):
        after = calls[-1:] if not linear or calls[-1] is not linear[-1] else []
        ends = described(after) or "a computation outside of its modules"
        raise InputError(
            f"model must end in a linear layer that gives the logits, but ends in {ends}: give it without, for "
            "instance without a softmax (a layer of torch.nn.Linear that is not called does not count)"
        )
    if times[linear[-1].module] > 1:
        raise InputError(
            f"layer {linear[-1].name!r} is called {times[linear[-1].module]} times: masks need one that is once"
        )
    chain = [linear[-1]]
    for call in reversed(linear[:-1]):
        if times[call.module] > 1 or not torch.equal(call.gave.relu(), chain[0].given):
            break
        chain.insert(0, call)
    return chain


def given_to(layer: nn.Module, model: nn.Module, inputs: Tensor, progress: bool) -> Tensor:
    """What a layer of a model is given for all inputs, (samples, n) float32."""
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, *arguments: given.append(given_by(*arguments).float()), with_kwargs=True)
    for batch in tqdm(inputs.split(AT_ONCE), "samples", delay=1, leave=False, disable=None if progress else True):
        model(batch)
    return torch.cat(given)


def copied_layers(chain: list[Call]) -> HookedMNISTClassifier:
    """The layers in float32, with the weights that they have under what is put on them."""
    sizes = [chain[0].given.shape[1], *(call.gave.shape[1] for call in chain)]
    classifier = HookedMNISTClassifier(sizes[1:-1], sizes[0], sizes[-1], bias=True).to(chain[0].given.device)
    for layer, call in zip(classifier.layers, chain):
        layer.weight.copy_(call.module.weight)
        if call.module.bias is None:
            layer.bias = None
        else:
            layer.bias.copy_(call.module.bias)
    return classifier


def described(calls: list[Call]) -> str:
    return ", ".join(f"layer {call.name!r}: {type(call.module).__name__}" for call in calls)
