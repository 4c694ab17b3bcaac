"""The processes of a run, one alone or several that torchrun has started, and what they tell one another."""

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=5)  # torchrun may have been killed in the meantime


def by_torchrun() -> bool:
    """Returns true where torchrun has started several processes, of which this is one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


class Processes:
    """The processes of a run, which share work and small values through the store of torch.distributed.

    They share the folder of the artifacts, and no tensor: gloo and nccl are not needed. Each takes the next GPU.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.count = 1
        self._store: dist.Store = dist.HashStore()
        if by_torchrun():
            self._store, self.rank, self.count = next(dist.rendezvous("env://", timeout=TIMEOUT))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    def _wait_for(self, key: str) -> bytes:
        """Returns what another process stores under this key. It waits in Python, so that a signal can end it."""
        while not self._store.check([key]):
            time.sleep(0.02)
        return self._store.get(key)

    def take(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields tasks that no other process has taken, until there are none; once per run."""
        while (taken := self._store.add("tasks taken", 1)) <= len(tasks):
            yield tasks[taken - 1]

    def first(self, begin: Callable[[], None]) -> None:
        """Calls a function in the first process, once per run; the others wait until it has returned."""
        if self.rank == 0:
            begin()
            self._store.set("begun", "")
        self._wait_for("begun")

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Calls `make` in the process that is first to pass this name; the others wait until it has returned."""
        if self._store.add(f"calls for {name}", 1) == 1:
            make()
            self._store.set(f"{name} is made", "")
        self._wait_for(f"{name} is made")

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values (as JSON holds them) of all processes in order to the first one, once per run."""
        if self.rank > 0:
            self._store.set(f"value of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self._wait_for(f"value of {rank}")) for rank in range(1, self.count)]


def peak_bytes() -> int:
    """Returns the most memory that this process has held; 0 on Windows, which does not say."""
    with suppress(ImportError):
        import resource

        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
