"""One process of a run at work: what it says, what its stages take, and files that are made once."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mimu.runs.files import Artifact
from mimu.runs.log import Log
from mimu.runs.processes import Processes


class Work:
    """What the stages of one process share.

    seconds: of every stage so far, by its name
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes = Processes()
        prefix = f"process {self.processes.rank}: " if self.processes.count > 1 else ""
        self.log = Log(root / "reports" / "run.log", prefix)
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage, and says when it is done."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[name] += seconds
        self.log(f"{name}: {seconds:.1f} s")

    def made(self, artifact: Artifact, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of a file: as it is there, or made and written by the first process that asks for it."""

        def make_it() -> None:
            if artifact.is_there:
                self.log(f"{name}: reused")
                return
            with self.stage(name):
                artifact.save(make())

        self.processes.once(artifact.path.name, make_it)
        return artifact.load()


def how_many(artifacts: Sequence[Artifact]) -> str:
    """How many of the files are there as they would be made, and why the others are not, in words."""
    reasons = Counter(each.why_not() for each in artifacts)
    there = f"{reasons.pop('', 0)} of {len(artifacts)} files are there"
    return f"{there}: {', '.join(f'{count} {why}' for why, count in reasons.items())}" if reasons else there


def describe_machine() -> str:
    """What the last digits of the numbers depend on."""
    return (
        f"{platform.node()}, {platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def memory_of(device: torch.device) -> float:
    """The bytes of memory that a device has; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(AttributeError, OSError, ValueError):  # Windows and others have no such names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
