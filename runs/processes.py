"""The processes of a run: this one alone, or all that torchrun has started."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mimu.runs.files import one_line


class Processes:
    """What the processes of a run tell one another, through the store of torch.distributed.

    They share the folder of the artifacts, and no tensor: gloo and nccl are not needed. Each takes the next GPU.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
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
        """Calls it in the first process, once a run; the others wait until it has returned, as in `once`."""
        if self.rank > 0:
            self._store.get("end of the beginning")
        self.once("the beginning", begin)

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Calls it in the process that asks first by this name; all return when it has, and raise where it raises."""
        if self._store.add(f"asked for {name}", 1) == 1:
            try:
                make()
            except BaseException as error:
                self._store.set(f"end of {name}", one_line(error))
                raise
            self._store.set(f"end of {name}", "")
        elif failure := self._store.get(f"end of {name}").decode():
            raise RuntimeError(f"{name} has failed in another process: {failure}")

    def gathered(self, value: Any) -> list[Any]:
        """The values (as JSON holds them) of all processes in order, once a run, at the first one; else nothing."""
        if self.rank > 0:
            self._store.set(f"value of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self._store.get(f"value of {rank}")) for rank in range(1, self.count)]
