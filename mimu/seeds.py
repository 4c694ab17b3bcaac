"""Random generators that depend on a key alone."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seeded(*key: object) -> torch.Generator:
    """Returns a random generator (CPU) that depends on its key alone, so that draws do not depend on other work."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Gives modules that are built in this context the weights of a seed; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
