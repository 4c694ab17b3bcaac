"""Modules around other modules: wrappers of a network, and collections of parameters."""

from torch import nn
from torch.nn.utils import parametrize

# Another module reads the entries of these.
COLLECTIONS = (nn.ParameterList, nn.ParameterDict, parametrize.ParametrizationList)


class Wrapper(nn.Module):
    """A module that runs another one, `network`. Masks are applied to that one, under its own names."""

    network: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the network inside a Wrapper, torch.compile, DataParallel or DistributedDataParallel."""
    is_parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    name = "network" if isinstance(model, Wrapper) else "module" if is_parallel else "_orig_mod"
    return unwrapped(getattr(model, name)) if hasattr(model, name) else model
