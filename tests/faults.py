"""Kills at any file operation, and damage to files: what the tests of lost and broken artifacts share."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any


class Killed(BaseException):
    """The process is gone: nothing that follows has any effect on the files."""


class Power:
    """Counts the operations on files, and cuts the power before one of them."""

    def __init__(self, cut_before: int | None, error: BaseException | None = None) -> None:
        self.cut_before = cut_before
        self.error = error or Killed()
        self.count = 0

    def use(self) -> None:
        self.count += 1
        if self.cut_before is not None and self.count > self.cut_before:
            raise self.error


class Watched:
    """A file open for writing, every write of which is an operation; a write that is cut leaves half of it."""

    def __init__(self, file: Any, power: Power) -> None:
        self._file, self._power = file, power

    def write(self, content: Any) -> int:
        try:
            self._power.use()
        except BaseException:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def power(monkeypatch: Any, cut_before: int | None = None, error: BaseException | None = None) -> Iterator[Power]:
    """Every operation on files is counted while the context is open, and from one of them on fails.

    error: what it raises, like a full disk; None: the process is killed
    """
    supply = Power(cut_before, error)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            supply.use()
            return function(*arguments, **options)

        return operation

    real_open = builtins.open

    def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return real_open(file, mode, *arguments, **options)
        supply.use()
        return Watched(real_open(file, mode, *arguments, **options), supply)

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
    return random.choice(
        [
            content[:position] + bytes([content[position] ^ 1 << random.randrange(8)]) + content[position + 1 :],
            content[:position] + some + content[end:],
            content[:position] + bytes(end - position) + content[end:],
            content[:position],
            content[:position] + content[end:],
            content[:position] + content[position:end] + content[position:],
            b"",
            content[::-1],
        ]
    )
