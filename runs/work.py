"""The processes of a run, this one alone or all that torchrun has started, and what the stages of each share."""

from __future__ import annotations

import datetime
import json
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
import torch.distributed as dist

from mimu.runs.files import Artifact, Log


class Processes:
    """What the processes of a run tell one another, through the store of torch.distributed.

    They share the folder of the artifacts, and no tensor: gloo and nccl are not needed. Each takes the next GPU.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.count = 1
        self._store: dist.Store = dist.HashStore()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            forever = datetime.timedelta(days=365)  # torchrun ends the others when one has failed
            store, self.rank, self.count = next(dist.rendezvous("env://", timeout=forever))
            # All begins anew when torchrun starts all processes again.
            self._store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            self._store.set_timeout(forever)
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    def take(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """The next task that no process has taken, until there is none; once a run."""
        while (taken := self._store.add("tasks taken", 1)) <= len(tasks):
            yield tasks[taken - 1]

    def first(self, begin: Callable[[], None]) -> None:
        """Calls it in the first process, once a run; the others wait until it has returned."""
        if self.rank == 0:
            begin()
            self._store.set("begun", "")
        self._store.get("begun")

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Calls it in the process that asks first by this name; the others wait until it has returned.

        Where it raises they wait for ever, and torchrun ends them.
        """
        if self._store.add(f"asked for {name}", 1) == 1:
            make()
            self._store.set(f"{name} is made", "")
        self._store.get(f"{name} is made")

    def gathered(self, value: Any) -> list[Any]:
        """The values (as JSON holds them) of all processes in order, once a run, at the first one; else nothing."""
        if self.rank > 0:
            self._store.set(f"value of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self._store.get(f"value of {rank}")) for rank in range(1, self.count)]


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
            else:
                with self.stage(name):
                    artifact.save(make())

        self.processes.once(artifact.path.name, make_it)
        return artifact.load()


def how_many(artifacts: Sequence[Artifact]) -> str:
    """How many of the files are there as they would be made, and why the others are not, in words."""
    reasons = Counter(each.why_not() for each in artifacts)
    there = f"{reasons.pop('', 0)} of {len(artifacts)} files are there"
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{there}: {why}" if why else there


def describe_machine() -> str:
    """What the last digits of the numbers depend on."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.node()}, {platform.machine()}, {torch.get_num_threads()} threads, {versions}"


def memory_of(device: torch.device) -> float:
    """The bytes of memory that a device has; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(AttributeError, OSError, ValueError):  # Windows and others have no such names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not say."""
    with suppress(ImportError):  # of Windows
        import resource

        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
