"""Kills at any file operation, and damage to files: what the tests of lost and broken artifacts share."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from matplotlib.figure import Figure
from running import metrics, run_here

from mimu.runs import files

SMALL = ("sweep.kappa=[auto, 20]", "gcn.steps=2", "gcn.warmup=0", "eval.methods=[original, mimu, retrain]")
MADE = ("checkpoints", "datasets/Graphs", "eval", "reports")  # the folders that a run makes where there is only data


@dataclass
class Power:
    """Counts the operations on files, and fails from one of them on, as on a full disk.

    before: is called before each operation, and in the middle of each write: here a kill leaves the files as they are
    """

    cut_before: int
    error: OSError | None
    before: Callable[[], object]
    count: int = 0

    def use(self) -> None:
        self.count += 1
        if self.error is not None and self.count > self.cut_before:
            raise self.error
        self.before()

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as an operation."""

        def operation(*arguments: Any, **options: Any) -> Any:
            self.use()
            return function(*arguments, **options)

        return operation


class Watched:
    """A file open for writing, every write of which is an operation; a write that is cut leaves half of it."""

    def __init__(self, file: Any, power: Power) -> None:
        self._file, self._power = file, power

    def write(self, content: Any) -> int:
        half = len(content) // 2
        try:
            self._power.use()
        finally:
            self._file.write(content[:half])
            self._file.flush()
        self._power.before()
        return half + self._file.write(content[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def power(
    monkeypatch: Any, cut_before: int = 0, error: OSError | None = None, before: Callable[[], object] = lambda: None
) -> Iterator[Power]:
    """Every operation on files is counted while the context is open; with an error, it fails from one of them on."""
    supply, real_open = Power(cut_before, error, before), builtins.open

    def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            return Watched(supply.watched(real_open)(file, mode, *arguments, **options), supply)
        return real_open(file, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_watched)
        for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, supply.watched(getattr(os, name)))
        yield supply


def damaged(content: bytes, random: Random) -> bytes:
    """The content with a bit or some bytes of it wrong, cut, doubled, or replaced."""
    position = random.randrange(len(content))
    end = min(len(content), position + random.choice([1, 2, 8, 100, len(content)]))
    some = bytes(random.randrange(256) for _ in range(end - position))
    head, middle, tail = content[:position], content[position:end], content[end:]
    flipped = head + bytes([content[position] ^ 1 << random.randrange(8)]) + content[position + 1 :]
    others = [flipped, head + some + tail, head + bytes(end - position) + tail, head, head + tail]
    return random.choice([*others, head + middle + middle + tail, b"", content[::-1]])


def draw_nothing(monkeypatch: Any) -> None:
    """Pictures are empty from here on, so that a run takes no time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))


def emptied(folder: Path) -> None:
    """Removes all that a run leaves."""
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)


def results(folder: Path) -> dict[str, dict]:
    """The JSON of every experiment without its seconds. Raises where any file is half written or damaged."""
    if partial := list(folder.rglob(f"*{files.PARTIAL}")):
        raise ValueError(f"half written: {partial}")
    for path in (*folder.rglob("*.pt"), *folder.glob("eval/*/metrics/*.json")):
        files.load(path)
    return metrics(folder)


def ended(folder: Path, within: float = 600) -> int | None:
    """The status of a run, in a process of its own that has all imports already; None: it was killed (SIGKILL)."""
    run = multiprocessing.get_context("fork").Process(target=run_here, args=(folder, *SMALL))
    run.start()
    run.join(within)
    if (status := run.exitcode) is None:
        run.kill()
        run.join()
    return status


def kill_runs(folder: Path, number: int) -> dict[str, int]:
    """How many runs were killed, how many sequences of killed ones were finished by an undisturbed one, and how many of
    these have the metrics of a run that was never killed."""
    import torchvision  # noqa: F401  # here, so that every run has it already

    draw_nothing(pytest.MonkeyPatch())
    random, started = Random(0), time.perf_counter()
    if ended(folder) != 0:
        raise RuntimeError("the undisturbed run failed")
    took, expected = time.perf_counter() - started, results(folder)
    emptied(folder)
    kills = finished = equal = 0
    while kills < number:
        status = ended(folder, random.uniform(0, took))
        if status is None:
            kills += 1
            # Now and then the sequence ends with a run that is left alone.
            if random.random() < 0.9 and kills < number:
                continue
            status = ended(folder)
        finished += 1
        equal += status == 0 and results(folder) == expected
        emptied(folder)
    return {"kills": kills, "finished": finished, "equal": equal}
