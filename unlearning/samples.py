"""Training samples as people have them: tensors, arrays, lists, data sets, loaders."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mimu.images.sources import seeded
from mimu.runs.files import InputError, one_line

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
