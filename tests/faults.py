"""Kills at any file operation, and damage to files: what the tests of lost and broken artifacts share."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure
from running import metrics

from mimu.runs import files

SMALL = ("sweep.kappa=[auto, 20]", "gcn.steps=2", "eval.methods=[original, mimu, retrain]")
MADE = ("checkpoints", "datasets/Graphs", "eval", "reports")  # the folders that a run makes where there is only data


class Watched:
    """A file open for writing, every write of which is an operation; a write that is cut leaves half of it."""

    def __init__(self, file: Any, use: Callable[[], None], before: Callable[[], object]) -> None:
        self._file, self._use, self._before = file, use, before

    def write(self, content: Any) -> int:
        half = len(content) // 2
        try:
            self._use()
        finally:
            self._file.write(content[:half])
            self._file.flush()
        self._before()
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
) -> Iterator[SimpleNamespace]:
    """Counts the operations on files while the context is open; with an error, they fail from one of them on.

    before: is called before each operation, and in the middle of each write: here a kill leaves the files as they are
    """
    supply, real_open = SimpleNamespace(count=0), builtins.open

    def use() -> None:
        supply.count += 1
        if error is not None and supply.count > cut_before:
            raise error
        before()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: (use(), function(*arguments, **options))[1]

    def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            return Watched(watched(real_open)(file, mode, *arguments, **options), use, before)
        return real_open(file, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_watched)
        for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
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
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))


def emptied(folder: Path) -> None:
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)


def results(folder: Path) -> dict[str, dict]:
    """The JSON of every experiment without its seconds. Raises where any file is half written or damaged."""
    if partial := list(folder.rglob(f"*{files.PARTIAL}")):
        raise ValueError(f"half written: {partial}")
    for path in (*folder.rglob("*.pt"), *folder.glob("eval/*/metrics/*.json")):
        files.load(path)
    return metrics(folder)
