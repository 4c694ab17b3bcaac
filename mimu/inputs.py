"""Models and samples of users, checked and made ready."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from mimu.batches import Batch, batches_of, check_finite_rows, joined, sketch, take_images, tensor_of
from mimu.erasing import late_layers
from mimu.errors import InputError, in_one_line, one_line, shortened
from mimu.hooked import HookedClassifier
from mimu.masks import Mask
from mimu.wrapping import logits_of, unwrapped

MANY_CLASSES = 30  # from so many on, a hidden layer is shared by too many of them
TRIED = 16  # samples on which a model is tried
HELD = 220_000_000  # numbers that late layers may be given for all samples, which take 0.9 GB; above, fewer are edited


@dataclass(frozen=True)
class CustomModel:
    """A user's model, ready to be masked.

    classifier: a copy in float32, under the mask that the model carries, from the layers to mask on
    masked: the indices of these layers
    cached_inputs: what the classifier reads for all samples, (samples, ...)
    labels: (samples) int64
    model_inputs: what the model itself reads for them, reduced (`sketch`); where it reads words, or nothing is to be
        erased, integers (samples, 0)
    num_classes: the number of its logits
    """

    classifier: HookedClassifier
    masked: tuple[int, ...]
    cached_inputs: Tensor
    labels: Tensor
    model_inputs: Tensor
    num_classes: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, inputs: Any, labels: Any, mask_layer: Any, progress: bool = True, erase: bool = False
    ) -> Self:
        """Copies a model, tries it on a few samples, exports it, and runs what precedes the layers to mask once.

        The inputs are read once, batch by batch: no more of them is kept than the layers to mask are given.

        Args:
            inputs, labels: as `batches_of` takes them; the device and type of inputs become those of the model
            mask_layer: the layers to mask, as `layers_to_mask` takes them
            progress: whether to show a progress bar
            erase: whether the layers to mask are the late ones, from which classes are erased

        Raises:
            InputError: the model returns no logits, is not finite, cannot be exported, or has no such layer.
        """
        check_model(model)
        model = copy_of(model)
        num_samples, batches = batches_of(inputs, labels, progress)
        first = next(batches)
        logits, few = run_on_few(model, first)
        check_finite_rows(logits, "logits", ", though inputs and weights are")
        few = few.float() if few.is_floating_point() else few
        types = [dtype for _, dtype in first.form.values()] if first.is_packed else [few.dtype]
        is_attacked = erase and all(dtype.is_floating_point for dtype in types)
        batches = chain([first], batches)
        del first  # so that its memory is free once it is read
        classifier = exported(model, few, logits)
        layers = late_layers_that_fit(classifier, num_samples) if erase else mask_layer
        masked = layers_to_mask(layers, classifier.names, classifier.trace.names_at_the_end, logits.shape[1])

        def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for images, labels, _ in batches:
                images = images.to(few)
                reduced = sketch(images) if is_attacked else labels.new_empty(len(labels), 0)
                yield classifier.prefix_activations(masked, images), labels.to(few.device), reduced.to(few.device)

        cached_inputs, labels, model_inputs = joined(rows(), num_samples)
        check_finite_rows(cached_inputs, f"what layer {classifier.names[masked[0]]!r} is given for inputs")
        return cls(classifier.suffix_from(masked), masked, cached_inputs, labels, model_inputs, logits.shape[1])


def check_model(model: nn.Module) -> None:
    """Raises InputError where this is no model, it has no layer to mask, or its parameters are not finite."""
    if not any(weight.ndim > 1 for weight in unwrapped(model).parameters()):
        raise InputError(f"model must have weights to mask, as linear layers do: {type(model).__name__} has none")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value) or value.is_meta or not value.detach().isfinite().all():
            raise InputError(f"model: {name} has numbers that are not finite, or none yet (lazy, on the device meta)")


def copy_of(model: nn.Module) -> nn.Module:
    """Copies a model in evaluation mode; a mask that it carries becomes permanent in the copy."""
    model = unwrapped(model)
    # PyTorch does not copy tensors that are computed from parameters, as torch.nn.utils.prune computes them.
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    with in_one_line(InputError, "model: cannot be copied"):
        copied = copy.deepcopy(model, {id(each): each.detach().clone() for each in computed})
        copied.eval()
    for module in copied.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # on CPUs convolutions and pooling take half of the time
    for weight in copied.parameters():
        weight.requires_grad_(weight.is_floating_point())
    if (carried := Mask.on(copied)) is not None:
        carried.apply(copied, permanent=True)
    return copied


def run_on_few(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs a model on a few inputs of a batch; returns their logits, and these inputs in the type that it takes.

    From then on the model takes tensors as `Batch.images` has them. Where it fails on their own type, that of its
    parameters is tried. Raises InputError where that fails, too.
    """
    take_images(model, batch.form)
    count = len(batch.labels)
    few = torch.linspace(0, count - 1, min(TRIED, count), dtype=torch.float32).long()
    inputs = batch.images[few.to(batch.images.device)].to(next(model.parameters()).device)
    types = dict.fromkeys([inputs.dtype, *(each.dtype for each in model.parameters() if each.is_floating_point())])
    first_error = None
    for dtype in types:
        try:
            logits = logits_of(model(inputs.to(dtype)))
            break
        except Exception as error:  # a user's model may raise anything
            first_error = first_error or error
    else:
        form = batch.form if batch.is_packed else f"of shape {tuple(inputs.shape)} and {inputs.dtype}"
        raise InputError(f"model: fails on inputs {form} ({one_line(first_error)})") from first_error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        has = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model must return logits, a tensor ({len(few)}, classes) for such inputs, not {has}")
    if logits.shape[1] == 1:
        raise InputError("model must return a logit for each class, not one z: torch.cat([-z / 2, z / 2], 1) are two")
    if dtype != inputs.dtype and not inputs.is_floating_point():
        span = f"from {batch.images.min().item()} to {batch.images.max().item()}"
        warnings.warn(f"inputs are {inputs.dtype}, {span}, but the model takes {dtype}: are they scaled?", stacklevel=5)
    return logits, inputs.to(dtype)


def exported(model: nn.Module, example: Tensor, logits: Tensor) -> HookedClassifier:
    """Turns a model to float32, and exports it as a graph of operations.

    example: some inputs; logits: what the model returned for them
    Raises InputError where torch.export cannot take it, it gives other logits in float32, or nothing can be masked.
    """
    with in_one_line(InputError, "model: cannot be masked"):
        classifier = HookedClassifier(model.float(), example)
        if not classifier.names:
            raise ValueError("no linear operation or convolution reads a parameter of its own once")
        classifier.trace.check_logits()
        last = classifier.names.index(classifier.trace.names_at_the_end[-1])
        classifier.record(example[[0, -1]], torch.zeros(2, dtype=torch.int64, device=example.device), [last])
        rtol, atol = (1e-3, 1e-4) if logits.dtype in (torch.float32, torch.float64) else (5e-2, 5e-2)
        if not torch.allclose(classifier.outputs(example)[1], logits.float(), rtol, atol):
            raise ValueError("it gives other logits in float32")
    return classifier


def layers_to_mask(mask_layer: Any, names: list[str], at_the_end: list[str], num_classes: int) -> tuple[int, ...]:
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


def late_layers_that_fit(classifier: HookedClassifier, num_samples: int) -> list[int]:
    """The late layers from which classes are erased, fewer where what they are given would take too much memory."""
    layers, trace = late_layers(classifier), classifier.trace
    for first in range(len(layers) - 2):
        start = trace.start_of([classifier.names[layer] for layer in layers[first:]])
        if num_samples * (prod(trace.shapes[start]) // 2) <= HELD:
            return layers[first:]
    return layers[-2:]


def requested_classes(forget_class: Any, labels: Tensor, num_classes: int, forgotten: Sequence[int]) -> set[int]:
    """The classes asked for. Raises InputError if they, the labels or the classes `forgotten` already do not fit."""
    classes = torch.empty(0) if forget_class is None else tensor_of(forget_class, "forget_class")
    if classes.ndim > 1 or classes.is_floating_point() or classes.dtype == torch.bool:
        must = f"a class, from 0 to {num_classes - 1}, or several"
        raise InputError(f"forget_class must be {must}, not {forget_class!r}")
    requested, present = set(classes.flatten().tolist()), set(labels.unique().tolist())
    if not requested or not present | requested <= set(range(num_classes)):
        values = f"{min(present)} to {max(present)} and {sorted(requested)}"
        raise InputError(f"labels and forget_class must be from 0 to {num_classes - 1}, not {values}")
    if missing := set(range(num_classes)) - present - set(forgotten):
        but = f", but for those that the mask on the model forgets: {sorted(forgotten)}" if forgotten else ""
        raise InputError(f"there must be samples of every class, not none of {str(sorted(missing))[:100]}{but}")
    return requested


@contextmanager
def plain_torch() -> Iterator[None]:
    """Switches autocast and inference mode off in this thread, and leaves alone what all threads share."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        with torch.autocast("cuda", enabled=False):
            yield
