"""Random generators that depend on a key alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seeded(*key: object) -> torch.Generator:
    """A random generator (CPU) that depends on its key alone, so that no draw depends on the order of other work."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Modules made while the context is open get the weights of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
