"""Models and samples of users, checked and made ready."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mimu.erasing import late_layers
from mimu.errors import InputError, one_line, shortened
from mimu.hooked import HookedClassifier
from mimu.masks import Mask
from mimu.seeds import seeded
from mimu.wrapping import logits_of, unwrapped

READ_AT_ONCE = 1000  # samples that a data set is read by, and a model is run on
MANY_CLASSES = 30  # from so many on, a hidden layer is shared by too many of them
TRIED = 16  # samples on which a model is tried


@dataclass(frozen=True)
class CustomModel:
    """A user's model, ready to be masked.

    classifier: a copy in float32, under the mask that the model carries, from the layers to mask on
    masked: the indices of these layers
    cached_inputs: what the classifier reads for all samples, (samples, ...)
    model_inputs: what the model itself reads for them
    num_classes: the number of its logits
    """

    classifier: HookedClassifier
    masked: tuple[int, ...]
    cached_inputs: Tensor
    model_inputs: Tensor
    num_classes: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, inputs: Tensor, mask_layer: Any = "auto", progress: bool = True, erase: bool = False
    ) -> Self:
        """Copies a model, tries it on a few samples, exports it, and runs what precedes the layers to mask once.

        Args:
            inputs: (samples, ...), as the model takes them; their device and type become those of the model
            mask_layer: the layers to mask, as `layers_to_mask` takes them
            progress: whether to show a progress bar
            erase: whether the layers to mask are the late ones, from which classes are erased

        Raises:
            InputError: the model returns no logits, is not finite, cannot be exported, or has no such layer.
        """
        check_model(model)
        model = copy_of(model)
        inputs = inputs.to(next(model.parameters()).device)
        few = torch.linspace(0, len(inputs) - 1, min(TRIED, len(inputs)), dtype=torch.float32).long()
        logits, inputs = run_on_few(model, inputs, few)
        check_finite_rows(logits, "logits", ", though inputs and weights are")
        float_inputs = inputs.float() if inputs.is_floating_point() else inputs
        classifier = exported(model, float_inputs[few], logits)
        layers = late_layers(classifier) if erase else mask_layer
        masked = layers_to_mask(layers, classifier.names, classifier.trace.names_at_the_end, logits.shape[1])
        cached_inputs = prefix_outputs(classifier, masked, float_inputs, progress)
        return cls(classifier.suffix_from(masked), masked, cached_inputs, inputs, logits.shape[1])

    @property
    def reads_features(self) -> bool:
        """True where all layers to mask are linear ones of features, as those on which the GCN was trained."""
        layers = [self.classifier.layers[index] for index in self.masked]
        return all(len(layer.shape) == 2 and layer.positions is None for layer in layers)


def check_model(model: nn.Module) -> None:
    """Raises InputError where this is no model, it has no layer to mask, or its parameters are not finite."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model must be the module that TorchScript was made of, not a ScriptModule")
    if not any(weight.ndim > 1 for weight in model.parameters()):
        must = "model must have weights to mask, of linear layers or convolutions"
        raise InputError(f"{must}: {type(model).__name__} has none")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise InputError(f"model: {name} has no numbers yet (lazy, or on the device meta)")
        if not value.detach().isfinite().all():
            raise InputError(f"model: {name} has numbers that are not finite")


def copy_of(model: nn.Module) -> nn.Module:
    """Copies a model in evaluation mode; a mask that it carries becomes permanent in the copy."""
    model = unwrapped(model)
    # PyTorch does not copy tensors that are computed from parameters, as torch.nn.utils.prune computes them.
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    try:
        copied = copy.deepcopy(model, {id(each): each.detach().clone() for each in computed})
        copied.eval()
    except Exception as error:  # a user's model may raise anything
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


def run_on_few(model: nn.Module, inputs: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
    """Runs a model on a few inputs, by their indices; returns their logits, and all inputs in the type that it takes.

    Where it fails on their own type, that of its parameters is tried. Raises InputError where that fails, too.
    """
    types = dict.fromkeys([inputs.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())])
    first_error = None
    for dtype in types:
        try:
            logits = logits_of(model(inputs[few].to(dtype)))
            break
        except Exception as error:  # a user's model may raise anything
            first_error = first_error or error
    else:
        about = f"inputs of shape {tuple(inputs[few].shape)} and {inputs.dtype}"
        raise InputError(f"model: fails on {about} ({one_line(first_error)})") from first_error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        has = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, a tensor ({len(few)}, classes) for such inputs, not {has}")
    if logits.shape[1] == 1:
        must = "model must return a logit for each class, not one: z stands for the two torch.cat([-z / 2, z / 2], 1)"
        raise InputError(must)
    if dtype != inputs.dtype and not inputs.is_floating_point():
        span = f"from {inputs.min().item()} to {inputs.max().item()}"
        warnings.warn(f"inputs are {inputs.dtype}, {span}, but the model takes {dtype}: are they scaled?", stacklevel=5)
    return logits, inputs.to(dtype)


def exported(model: nn.Module, example: Tensor, logits: Tensor) -> HookedClassifier:
    """Turns a model to float32, and exports it as a graph of operations.

    example: some inputs; logits: what the model returned for them
    Raises InputError where torch.export cannot take it, it gives other logits in float32, or nothing can be masked.
    """
    try:
        classifier = HookedClassifier(model.float(), example)
        if not classifier.names:
            raise ValueError("no linear operation or convolution reads a parameter of its own once")
        if why_no_logits := classifier.trace.why_no_logits:
            raise ValueError(f"must end in a layer that gives the logits, but {why_no_logits}")
        last = classifier.names.index(classifier.trace.names_at_the_end[-1])
        classifier.record(example[:2], torch.zeros(2, dtype=torch.int64, device=example.device), [last])
        rtol, atol = (1e-3, 1e-4) if logits.dtype in (torch.float32, torch.float64) else (5e-2, 5e-2)
        if not torch.allclose(classifier.outputs(example)[1], logits.float(), rtol, atol):
            raise ValueError("gives other logits in float32")
    except Exception as error:  # a user's model may raise anything
        raise InputError(f"model: {one_line(error)}") from error
    return classifier


def layers_to_mask(
    mask_layer: Any, names: Sequence[str], at_the_end: Sequence[str], num_classes: int
) -> tuple[int, ...]:
    """The indices of the layers to mask, in their order.

    By default it is the last but one of three or more linear layers at the end, which stands between two others as
    those on which the GCN was trained; else, or with many classes, the last layer, as those before it cost the retained
    classes more (docs/networks.md).

    Args:
        mask_layer: "auto", None (all), or one or several names, as in `named_parameters`, of modules, or with * and ?,
            or indices among the layers that can be masked
        names: the layers that can be masked
        at_the_end: the linear layers in a row that the model ends in, or its last layer

    Raises:
        InputError: there is no such layer.
    """
    if mask_layer is None:
        return tuple(range(len(names)))
    if isinstance(mask_layer, str) and mask_layer == "auto":
        is_hidden = len(at_the_end) > 2 and num_classes < MANY_CLASSES
        return (names.index(at_the_end[-2 if is_hidden else -1]),)
    several = mask_layer if isinstance(mask_layer, tuple | list) else [mask_layer]
    indices: set[int] = set()
    for each in several or [mask_layer]:
        if isinstance(each, str):
            matching = {i for i, name in enumerate(names) if fnmatchcase(name, each) or fnmatchcase(name, f"{each}.*")}
        else:
            is_index = type(each) is int and -len(names) <= each < len(names)  # type: a bool is no index
            matching = {each % len(names)} - indices if is_index else set()
        if not matching:
            must = f"auto, None, or some of {shortened(', '.join(names))}, by name, pattern or index, each once"
            raise InputError(f"mask_layer must be {must}; not {shortened(repr(mask_layer))}")
        indices |= matching
    return tuple(sorted(indices))


def prefix_outputs(classifier: HookedClassifier, layers: Sequence[int], inputs: Tensor, progress: bool) -> Tensor:
    """Runs all that precedes some layers on all samples, (samples, ...). Raises InputError where it is not finite."""
    parts = with_progress(inputs.split(min(READ_AT_ONCE, classifier.samples_at_once)), progress)
    values = torch.cat([classifier.prefix_activations(layers, part) for part in parts])
    check_finite_rows(values, f"what layer {classifier.names[layers[0]]!r} is given for inputs")
    return values


def samples_of(inputs: Any, labels: Any, progress: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs (samples, ...) and labels (samples) int64 as tensors, all finite.

    Without labels, inputs is a DataLoader, or a data set, of pairs (input, label). Raises InputError.
    """
    if labels is None:
        try:
            loader = inputs if isinstance(inputs, DataLoader) else DataLoader(inputs, READ_AT_ONCE)
            batches = with_progress(with_own_generator(loader), progress)
            inputs, labels = (torch.cat(list(map(torch.atleast_1d, each))) for each in zip(*batches, strict=True))
        except Exception as error:  # a user's data set may raise anything
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


def with_progress(batches: Iterable, progress: bool) -> tqdm:
    """Shows a bar over batches of samples, on a terminal, if they take more than a second."""
    return tqdm(batches, "samples", delay=1, leave=False, disable=None if progress else True)


def with_own_generator(loader: DataLoader) -> DataLoader:
    """Copies a loader; the copy draws from generators of its own, where it would draw from the global one."""
    loader = copy.copy(loader)
    loader.generator = loader.generator or seeded("samples")
    if getattr(loader.sampler, "generator", True) is None:
        sampler, batches = copy.copy(loader.sampler), copy.copy(loader.batch_sampler)
        sampler.generator = seeded("order")
        if batches is not None:
            batches.sampler = sampler
        vars(loader).update(sampler=sampler, batch_sampler=batches)  # PyTorch forbids setting these
    return loader


def tensor_of(value: Any, name: str) -> Tensor:
    """Turns a value into a tensor. Raises InputError, with the name of the value, where that is impossible."""
    try:
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            value = torch.stack(list(value))
        if not isinstance(value, Tensor):
            array = np.array(value)  # by NumPy, so that numbers do not take the default type of PyTorch
            value = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
    except Exception as error:  # any value may come here
        has = f"{type(value).__name__} ({one_line(error)})"
        raise InputError(f"{name} must be a tensor, an array or a list, not {has}") from None
    is_special = value.is_nested or value.is_complex() or value.is_meta or value.is_quantized
    if is_special or value.layout != torch.strided:
        raise InputError(f"{name} must be real numbers in a dense tensor, not {value.dtype}, {value.layout}")
    return value.detach().clone() if value.is_inference() else value.detach()


def check_finite_rows(values: Tensor, name: str, why: str = "") -> None:
    """Raises InputError where a row of values (samples, ...) is not finite, or not once squared; names the first."""
    is_finite = torch.linalg.vector_norm(values.flatten(1).float(), dim=1).isfinite()
    if not is_finite.all():
        raise InputError(f"{name}[{int((~is_finite).nonzero()[0])}] is not finite, or too large to be squared{why}")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Switches autocast and inference mode off in this thread, and leaves alone what all threads share."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        with torch.autocast("cuda", enabled=False):
            yield
