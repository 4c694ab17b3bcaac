"""Models and samples of users, checked and made ready."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mimu.erasing import late_layers
from mimu.errors import InputError, one_line
from mimu.masks import Mask
from mimu.seeds import seeded
from mimu.tracing import HookedClassifier
from mimu.wrapping import unwrapped

AT_ONCE = 1000  # samples that a data set is read by, and a model is run on


def tensor_of(value: Any, name: str) -> Tensor:
    """A value as a tensor. Raises InputError where it is none, by its name."""
    try:
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            value = torch.stack(list(value))
        if not isinstance(value, Tensor):
            array = np.array(value)  # numbers of Python as NumPy takes them, whatever the default type of PyTorch
            value = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
    except Exception as error:  # of anything
        found = f"{type(value).__name__} ({one_line(error)})"
        raise InputError(f"{name} must be a tensor, an array or a list, not {found}") from None
    is_special = value.is_nested or value.is_complex() or value.is_meta or value.is_quantized
    if is_special or value.layout != torch.strided:
        raise InputError(f"{name} must be real numbers in a dense tensor, not {value.dtype}, {value.layout}")
    return value.detach().clone() if value.is_inference() else value.detach()


def samples_of(inputs: Any, labels: Any, progress: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs (samples, ...) and labels (samples) int64, all finite.

    Without labels, inputs is a DataLoader, or a data set, of pairs (input, label). Raises InputError.
    """
    if labels is None:
        try:
            loader = with_own_generator(inputs if isinstance(inputs, DataLoader) else DataLoader(inputs, AT_ONCE))
            shown = tqdm(loader, "samples", delay=1, leave=False, disable=None if progress else True)
            inputs, labels = (torch.cat(list(map(torch.atleast_1d, each))) for each in zip(*shown, strict=True))
        except Exception as error:  # of a custom data set, any
            must = "where labels are not given, inputs must be a DataLoader or a data set of pairs (input, label)"
            raise InputError(f"{must}, not {type(inputs).__name__} ({one_line(error)})") from error
    labels = tensor_of(labels, "labels")
    if isinstance(inputs, tuple) and len(inputs) != labels.numel():
        must = "inputs must be one tensor, (samples, ...): wrap a model of several in one that takes them as one"
        raise InputError(f"{must}; not a tuple of {len(inputs)} for {labels.numel()} labels")
    inputs = tensor_of(inputs, "inputs")
    if inputs.ndim < 2 or not inputs.numel():
        raise InputError(f"inputs must be samples, (samples, ...), not of shape {tuple(inputs.shape)}")
    if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        has = f"{labels.dtype} of {tuple(labels.shape)}"
        raise InputError(f"labels must be integers of shape ({len(inputs)},), one for every sample, not {has}")
    check_finite_rows(inputs, "inputs")
    return inputs, labels.to(inputs.device, torch.int64)


def with_own_generator(loader: DataLoader) -> DataLoader:
    """A copy of a loader that draws from a generator of its own where it would draw from that of the whole process."""
    loader = copy.copy(loader)
    loader.generator = loader.generator or seeded("samples")
    if getattr(loader.sampler, "generator", True) is None:
        sampler, batches = copy.copy(loader.sampler), copy.copy(loader.batch_sampler)
        sampler.generator = seeded("order")
        if batches is not None:
            batches.sampler = sampler
        vars(loader).update(sampler=sampler, batch_sampler=batches)  # PyTorch does not let one set these
    return loader


def check_finite_rows(values: Tensor, name: str, why: str = "") -> None:
    """Raises InputError where a row of values (samples, ...) is not finite, or not once squared; names the first."""
    is_finite = torch.linalg.vector_norm(values.flatten(1).float(), dim=1).isfinite()
    if not is_finite.all():
        raise InputError(f"{name}[{int((~is_finite).nonzero()[0])}] is not finite, or too large to be squared{why}")


TRIED = 16  # samples on which it is seen what a model does


@contextmanager
def plain_torch() -> Iterator[None]:
    """No autocast and no inference mode, in this thread; what all threads share is left as it is."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        with torch.autocast("cuda", enabled=False):
            yield


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, under the mask that it carries: nothing is done to the original."""
    model = unwrapped(model)
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
    for weight in copied.parameters():
        weight.requires_grad_(weight.is_floating_point())
    if (carried := Mask.on(copied)) is not None:
        carried.apply(copied, permanent=True)
    return copied


@dataclass(frozen=True)
class CustomModel:
    """What of a model masks are made on: the whole of it, or where it cannot be exported the linear layers at its end.

    classifier: a copy in float32, masked where the model is, begun before the layers that are to be masked
    masked: the indices of these
    inputs: what it is given for all samples, (samples, ...)
    images: what the model itself is given for them
    num_classes: how many logits it gives
    """

    classifier: HookedClassifier
    masked: tuple[int, ...]
    inputs: Tensor
    images: Tensor
    num_classes: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, inputs: Tensor, mask_layer: Any = "auto", progress: bool = True, erase: bool = False
    ) -> Self:
        """Takes a model as it is, and looks at what it does with a few samples.

        inputs: (samples, ...), as the model takes them but for device and type, which are made those of the model.
        erase: whether the layers to mask are the late ones, which classes are erased from
        Warns where a model cannot be exported, and other layers were asked for than those at its end.
        Raises InputError where it gives no logits, is not finite, or a layer of mask_layer cannot be masked.
        """
        check_model(model)
        model = copy_of(model)
        inputs = inputs.to(next(model.parameters()).device)
        few = torch.linspace(0, len(inputs) - 1, min(TRIED, len(inputs)), dtype=torch.float32).long()
        logits, inputs = tried(model, inputs, few)
        check_finite_rows(logits, "logits", ", though inputs and weights are")
        given = inputs.float() if inputs.is_floating_point() else inputs
        whole, why_not = looked_into(model, given[few], logits)
        if whole is None:
            whole, given = last_in_a_row(model, inputs, few, why_not, progress)
        elif why_no_logits := whole.trace.why_no_logits:
            raise InputError(f"model must end in a layer that gives the logits, but {why_no_logits}")
        asked = late_layers(whole) if erase else mask_layer
        masked = chosen(asked, whole.names, whole.trace.names_at_the_end)
        if why_not and mask_layer != "auto":
            warnings.warn(f"of layers {whole.names} at the end of the model alone, as {why_not}", stacklevel=4)
        return cls(whole, masked, given, inputs, logits.shape[1]).begun(progress)

    @property
    def is_of_features(self) -> bool:
        """Whether all layers to mask are linear ones of features, as those that the GCN has seen."""
        shapes, positions = self.classifier.shapes, self.classifier.positions
        return all(len(shapes[layer]) == 2 and positions(layer) is None for layer in self.masked)

    def begun(self, progress: bool) -> Self:
        """The same from where the layers to mask can be reached: what comes before runs once."""
        classifier, parts = self.classifier, self.inputs.split(min(AT_ONCE, self.classifier.samples_at_once))
        shown = tqdm(parts, "samples", delay=1, leave=False, disable=None if progress else True)
        given = torch.cat([classifier.prefix_activations(self.masked, part) for part in shown])
        check_finite_rows(given, f"what layer {classifier.names[self.masked[0]]!r} is given for inputs")
        return replace(self, classifier=classifier.suffix_from(self.masked), inputs=given)


def chosen(mask_layer: Any, names: Sequence[str], at_the_end: Sequence[str]) -> tuple[int, ...]:
    """The layers to mask, by their indices among those that can be: all (None), one (auto), or those that are named.

    mask_layer: names or indices, one or several; a name may be that of a module, or a pattern with * and ?
    at_the_end: the linear layers in a row that the model ends in, or its last layer
    By default, of three in a row or more it is the last but one, which stands between two others as those that the GCN
    was trained on; else the last of all: those before it cost the other classes more (docs/networks.md).
    Raises InputError where one that is asked for cannot be masked.
    """
    if mask_layer is None:
        return tuple(range(len(names)))
    if isinstance(mask_layer, str) and mask_layer == "auto":
        return (names.index(at_the_end[-2 if len(at_the_end) > 2 else -1]),)
    asked = mask_layer if isinstance(mask_layer, tuple | list) else [mask_layer]
    found: set[int] = set()
    for each in asked or [mask_layer]:
        if isinstance(each, str):
            is_asked = [fnmatchcase(name, each) or fnmatchcase(name, f"{each}.*") for name in names]
            of_name = {index for index, is_one in enumerate(is_asked) if is_one}
        else:
            is_index = type(each) is int and -len(names) <= each < len(names)  # a bool is none
            of_name = {each % len(names)} if is_index else set()
        if not of_name or (not isinstance(each, str) and of_name <= found):
            must = f"auto, None, or some of {', '.join(names)[:300]}, by name, pattern or index, each once"
            raise InputError(f"mask_layer must be {must}; not {mask_layer!r}")
        found |= of_name
    return tuple(sorted(found))


def check_model(model: nn.Module) -> None:
    """Raises InputError where a model is none, has no layer to mask, or holds numbers that are not finite."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not any(weight.ndim > 1 for weight in model.parameters()):
        must = "model must have weights to mask, of linear layers or convolutions"
        raise InputError(f"{must}: {type(model).__name__} has none")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise InputError(f"model: {name} has no numbers yet (lazy, or on the device meta)")
        if not value.detach().isfinite().all():
            raise InputError(f"model: {name} has numbers that are not finite")


def looked_into(model: nn.Module, example: Tensor, logits: Tensor) -> tuple[HookedClassifier | None, str]:
    """A copy of a whole model in float32, and ""; or None, and why there is none.

    example: some inputs; logits: what the model gives for them
    """
    model = copy_of(model).float()
    try:
        classifier = HookedClassifier(model, example)
        if not classifier.names:
            return None, "no linear operation or convolution reads a parameter of its own once"
        found = classifier.outputs(example)[1]
        last = classifier.names.index(classifier.trace.names_at_the_end[-1])
        classifier.record(example[:2], torch.zeros(2, dtype=torch.int64, device=example.device), [last])
    except Exception as error:  # of a custom model, any
        return None, f"the model cannot be run operation by operation: {one_line(error)}"
    rtol, atol = (1e-3, 1e-4) if logits.dtype in (torch.float32, torch.float64) else (5e-2, 5e-2)
    is_close = torch.allclose(found, logits.float(), rtol, atol)
    return (classifier, "") if is_close else (None, "in float32 the model gives other logits")


def tried(model: nn.Module, inputs: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a model for a few inputs, and all inputs as it takes them.

    Inputs of another type than it takes are given in that of its parameters. Raises InputError where it fails.
    """
    types = dict.fromkeys([inputs.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())])
    failed = None
    for dtype in types:
        try:
            logits = model(inputs[few].to(dtype))
            break
        except Exception as error:  # of a custom model, any
            failed = failed or error
    else:
        about = f"inputs of shape {tuple(inputs[few].shape)} and {inputs.dtype}"
        raise InputError(f"model: fails on {about} ({one_line(failed)})") from failed
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        has = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, a tensor ({len(few)}, classes) for such inputs, not {has}")
    if dtype != inputs.dtype and not inputs.is_floating_point():
        span = f"from {inputs.min().item()} to {inputs.max().item()}"
        warnings.warn(f"inputs are {inputs.dtype}, {span}, but the model takes {dtype}: are they scaled?", stacklevel=5)
    return logits, inputs.to(dtype)


def last_in_a_row(
    model: nn.Module, inputs: Tensor, few: Tensor, why_not: str, progress: bool
) -> tuple[HookedClassifier, Tensor]:
    """A copy in float32 that runs only the linear layers that a model ends in, and what the first is given for all.

    Each is given what the one before gave, through a ReLU. why_not: why the model is not looked into otherwise
    Raises InputError where there are none.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str, module: nn.Linear, arguments: tuple, named: dict, gave: Tensor) -> None:
        (given,) = (*arguments, *named.values())
        calls.append((name, given.clone(), gave.clone()))

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with ExitStack() as hooks:
        for name, module in linear.items():
            hooks.callback(module.register_forward_hook(partial(note, name), with_kwargs=True).remove)
        logits = model(inputs[few])
    times, row, after = Counter(call[0] for call in calls), [], logits
    for name, given, gave in reversed(calls):
        if times[name] > 1 or not torch.equal(gave.relu() if row else gave, after):
            break
        row, after = [name, *row], given

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for name in row:
            layer = self.get_submodule(name)
            x = F.linear(x if name == row[0] else x.relu(), layer.weight, layer.bias)
        return x

    end = copy.copy(model)
    end.forward = MethodType(forward, end)
    classifier, _ = looked_into(end, after.float(), logits)
    if classifier is None:
        must = "must end in linear layers that are each called once and give the logits"
        raise InputError(f"model {must}, as {why_not}")
    given: list[Tensor] = []
    first = linear[row[0]]
    first.register_forward_pre_hook(lambda _, args, named: given.extend([*args, *named.values()]), with_kwargs=True)
    for batch in tqdm(inputs.split(AT_ONCE), "samples", delay=1, leave=False, disable=None if progress else True):
        model(batch)
    return classifier, torch.cat(given).float()
