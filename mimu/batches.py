"""Samples of users, read batch by batch, checked, and joined again."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mimu.errors import InputError, in_one_line
from mimu.seeds import seeded
from mimu.wrapping import logits_of

READ_AT_ONCE = 250  # samples of a batch, where the user gives no DataLoader
SKETCHED = 1024  # numbers of a sample to which those of larger inputs are reduced
SKETCHED_AT_ONCE = 16  # samples: those of a whole batch would take its memory twice more
EXPECTED = "without labels, inputs must be a DataLoader or a data set of pairs (input, label) or of dicts with labels"

Form = dict[str | int, tuple[tuple[int, ...], torch.dtype]]


class Batch(NamedTuple):
    """Some samples of the user's, and what a model takes them as.

    images: (samples, ...); of a model that takes several tensors, or takes them by name, (samples, numbers) float32,
        where they stand side by side
    labels: (samples) int64
    form: the shape of a sample and the type of each tensor, by the name or the place of the model's argument
    """

    images: Tensor
    labels: Tensor
    form: Form

    @property
    def is_packed(self) -> bool:
        """True if the model takes more than one tensor, or takes it by name."""
        return [*self.form] != [0]


def batches_of(inputs: Any, labels: Any, progress: bool = True) -> tuple[int, Iterator[Batch]]:
    """Reads samples batch by batch; returns about the number of all samples (0: unknown), too.

    Args:
        inputs: (samples, ...), or several such tensors in a dict or a tuple; or, without labels, a DataLoader or a data
            set of tuples (input, ..., label), or of dicts with labels
        labels: integers, (samples)

    Raises:
        InputError: the samples are something else, not finite, or not all of one shape
    """
    if labels is None and isinstance(inputs, Mapping):
        inputs, labels = arguments_of(inputs)
    if labels is None:
        source = with_own_generator(inputs if isinstance(inputs, DataLoader) else DataLoader(inputs, READ_AT_ONCE))
        num_samples = length_hint(source.sampler)
    else:
        labels = tensor_of(labels, "labels")
        if not isinstance(inputs, Mapping):
            are_several = isinstance(inputs, tuple) and len(inputs) != labels.numel()
            inputs = dict(enumerate(inputs if are_several else [inputs]))
        tensors, labels = arguments_of((inputs, labels))
        num_samples = len(labels)
        parts = zip(*(each.split(READ_AT_ONCE) for each in (labels, *tensors.values())))
        source = [(dict(zip(tensors, each)), label) for label, *each in parts]

    def batches() -> Iterator[Batch]:
        first, count = None, 0
        with in_one_line(InputError, f"{EXPECTED}, not {type(inputs).__name__}"):
            # A bar is shown on a terminal, if the batches take more than a second.
            for batch in tqdm(source, "samples", unit=" batches", delay=1, leave=False, disable=not progress or None):
                tensors, labels = arguments_of(batch)
                form = {name: (tuple(each.shape[1:]), each.dtype) for name, each in tensors.items()}
                if form != (first := first or form):
                    must = "samples of all batches must have one shape and type (pad texts to one length)"
                    raise InputError(f"{must}: first {first}, then {form}")
                images = tensors[0] if [*tensors] == [0] else packed(tensors)
                check_finite_rows(images, "inputs", start=count)
                count += len(labels)
                yield Batch(images, labels, form)
            if not count:
                raise InputError("inputs must be samples, not an empty DataLoader")

    return num_samples, batches()


def arguments_of(batch: Any) -> tuple[dict[str | int, Tensor], Tensor]:
    """The tensors (samples, ...) of a batch by the names or places of the model's arguments, and its labels (samples).

    batch: a tuple (input, ..., label), or a dict with labels; an input may be a dict or a tuple of several
    Raises InputError where it does not hold samples and their labels.
    """
    match batch:
        case {"labels": labels, **inputs} | {"label": labels, **inputs} | [inputs, labels]:
            pass
        case [_, *_, _, labels]:
            inputs = batch[:-1]
        case _:
            has = [*batch] if isinstance(batch, Mapping) else f"batches of {type(batch).__name__}"
            raise InputError(f"{EXPECTED}, not {has}")
    if not isinstance(inputs, Mapping):
        inputs = dict(enumerate(inputs if isinstance(inputs, list | tuple) else [inputs]))
    labels = tensor_of(labels, "labels")
    tensors = {name: tensor_of(each, f"inputs[{name!r}]" if name else "inputs") for name, each in inputs.items()}
    for each in tensors.values():
        if not each.numel() or each.ndim < 1 + (len(tensors) == 1):
            raise InputError(f"inputs must be samples, (samples, ...), not of shape {tuple(each.shape)}")
        if labels.shape != each.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            has = f"{labels.dtype} of {tuple(labels.shape)}"
            raise InputError(f"labels must be integers of shape ({len(each)},), one for every sample, not {has}")
    return tensors, labels.long()


def packed(tensors: Mapping[str | int, Tensor]) -> Tensor:
    """Puts tensors (samples, ...) side by side, (samples, numbers) float32. Raises InputError for large integers."""
    columns = []
    for name, tensor in tensors.items():
        columns.append(column := tensor.reshape(len(tensor), -1).float())
        if not tensor.is_floating_point() and not torch.equal(column.to(tensor.dtype).view_as(tensor), tensor):
            raise InputError(f"inputs[{name!r}] must be whole numbers that float32 holds, such as all below 2^24")
    return torch.cat(columns, 1)


def take_images(model: nn.Module, form: Form) -> None:
    """Makes a model take one tensor, `Batch.images`, whatever it takes by itself, and return the logits alone."""
    forward, sizes = model.forward, [prod(shape) for shape, _ in form.values()]

    def logits(images: Tensor) -> Any:
        if [*form] == [0]:
            return logits_of(forward(images))
        floats = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        arguments = {}
        for (name, (shape, dtype)), part in zip(form.items(), images.split(sizes, 1)):
            arguments[name] = part.reshape((-1, *shape)).to(floats if dtype.is_floating_point else dtype)
        return logits_of(forward(*arguments.values()) if 0 in form else forward(**arguments))

    model.forward = logits  # a module around it would change the names of its weights


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
    with in_one_line(InputError, f"{name} must be a tensor, an array or a list, not {type(value).__name__}"):
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            value = torch.stack(list(value))
        if not isinstance(value, Tensor):
            array = np.array(value)  # by NumPy, so that numbers do not take the default type of PyTorch
            value = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
    if value.is_nested or value.is_complex() or value.layout != torch.strided:
        raise InputError(f"{name} must be real numbers in a dense tensor, not {value.dtype}, {value.layout}")
    return value.detach().clone() if value.is_inference() else value.detach()


def check_finite_rows(values: Tensor, name: str, why: str = "", start: int = 0) -> None:
    """Raises InputError where a row of values (samples, ...) is not finite, or not once squared; names the first.

    why: ends the message; start: the index of the first row
    """
    is_finite = torch.linalg.vector_norm(values.flatten(1).float(), dim=1).isfinite()
    if not is_finite.all():
        index = start + int((~is_finite).nonzero()[0])
        raise InputError(f"{name}[{index}] is not finite, or too large to be squared{why}")


def sketch(images: Tensor) -> Tensor:
    """Reduces inputs to (samples, SKETCHED), or fewer: sums of every SKETCHED-th number under random signs.

    Such a count sketch keeps inner products on average (Charikar et al. 2002).
    """
    images = images.flatten(1)
    numbers = images.shape[1]
    if numbers <= SKETCHED:
        return images
    signs = torch.randint(2, (numbers,), generator=seeded("sketch", numbers)).to(images) * 2 - 1
    products = (F.pad(part * signs, (0, -numbers % SKETCHED)) for part in images.split(SKETCHED_AT_ONCE))
    return torch.cat([part.unflatten(1, (-1, SKETCHED)).sum(1) for part in products])


def joined(batches: Iterable[tuple[Tensor, ...]], num_samples: int) -> list[Tensor]:
    """Joins tensors (samples, ...) of batches, one of each kind, without holding them twice.

    num_samples: about the number of all samples. Memory for more is reserved, but not used.
    """
    all_rows, count = [], 0
    for parts in batches:
        start, count = count, count + len(parts[0])
        all_rows = all_rows or [part.new_empty(0) for part in parts]
        for rows, part in zip(all_rows, parts):
            if count > len(rows):
                rows.resize_(max(num_samples, 2 * count), *part.shape[1:])
            rows[start:count] = part
    return [rows[:count] for rows in all_rows]
