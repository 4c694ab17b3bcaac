"""Modules around other modules: wrappers of a network, and collections of parameters."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from mimu.errors import InputError

# Another module reads the entries of these.
COLLECTIONS = (nn.ParameterList, nn.ParameterDict, parametrize.ParametrizationList)


class Wrapper(nn.Module):
    """A module that runs another one, `network`. Masks are applied to that one, under its own names."""

    network: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the network inside a Wrapper, torch.compile, DataParallel or DistributedDataParallel.

    Raises:
        InputError: if it is no module, or one of TorchScript
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    is_parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    name = "network" if isinstance(model, Wrapper) else "module" if is_parallel else "_orig_mod"
    return unwrapped(getattr(model, name)) if hasattr(model, name) else model


def logits_of(output: Any) -> Any:
    """Returns the attribute `logits` of a model's output, as models of Hugging Face have it; or else the output."""
    return getattr(output, "logits", output)
