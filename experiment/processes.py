"""The processes of a run, this one alone or all that torchrun has started, and what the stages of each share."""

from __future__ import annotations

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


class Processes:
    """What the processes of a run tell one another, through the store of torch.distributed.

    They share the folder of the artifacts, and no tensor: gloo and nccl are not needed. Each takes the next GPU.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.count = 1
        self._store: dist.Store = dist.HashStore()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            limit = datetime.timedelta(minutes=5)  # torchrun may have been killed meanwhile
            self._store, self.rank, self.count = next(dist.rendezvous("env://", timeout=limit))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    def _wait_for(self, key: str) -> bytes:
        """What another process stores by this key; waits in Python, since no signal ends the wait of a store."""
        while not self._store.check([key]):
            time.sleep(0.02)
        return self._store.get(key)

    def take(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """The next task that no process has taken, until there is none; once a run."""
        while (taken := self._store.add("tasks taken", 1)) <= len(tasks):
            yield tasks[taken - 1]

    def first(self, begin: Callable[[], None]) -> None:
        """Calls it in the first process, once a run; the others wait until it has returned."""
        if self.rank == 0:
            begin()
            self._store.set("begun", "")
        self._wait_for("begun")

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Calls it in the process that asks first by this name; the others wait until it returns (or are ended)."""
        if self._store.add(f"asked for {name}", 1) == 1:
            make()
            self._store.set(f"{name} is made", "")
        self._wait_for(f"{name} is made")

    def gathered(self, value: Any) -> list[Any]:
        """The values (as JSON holds them) of all processes in order, once a run, at the first one; else nothing."""
        if self.rank > 0:
            self._store.set(f"value of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self._wait_for(f"value of {rank}")) for rank in range(1, self.count)]


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not say."""
    with suppress(ImportError):  # of Windows
        import resource

        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
