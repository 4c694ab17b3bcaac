"""Files that are written whole and know what made them, the lock on their folder, and the log of a run."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimu.errors import ArtifactError
from mimu.files import PARTIAL, load, naming, save

ROOT = Path(__file__).resolve().parents[1]


def slug(name: str) -> str:
    """The name in letters, digits and underscores, as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def damaged(root: Path) -> Iterator[ArtifactError]:
    """What is wrong with the files that runs have left, where it is."""
    for pattern in ("checkpoints/*_seed_*.pt", "datasets/Graphs/seed_*.pt", "eval/masks/seed_*.pt", "eval/*/metrics/*"):
        for path in root.glob(pattern):
            try:
                load(path)
            except ArtifactError as error:
                yield error


def code_of(root: Path, patterns: Iterable[str]) -> dict[str, str]:
    """File to the hash of its bytes, for all files under `root` that match a pattern such as `audits/*.py`."""
    hashes = {}
    for pattern in patterns:
        for path in root.glob(pattern):
            hashes[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return hashes


@dataclass(frozen=True)
class Artifact:
    """A file of a run, and all that decides what is in it: with any of that changed it is made anew.

    provenance: digests of this: of settings, the code, the data, PyTorch
    seen: which version of files was found to be whole, so that it is not read again only to find that out
    """

    path: Path
    provenance: dict[str, str]
    seen: dict[Path, tuple[dict[str, str], int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def save(self, content: dict[str, Any]) -> None:
        save(self.path, content | {"made_by": self.provenance})

    def load(self) -> dict[str, Any]:
        """The content. Raises ArtifactError where it is not there, damaged, or made by something else."""
        content = load(self.path)
        if content.get("made_by") != self.provenance:
            raise ArtifactError(f"{self.path}: was made by other settings, code or data")
        return content

    def differences(self) -> list[str]:
        """What was other when the most alike of the files that are there was made; nothing where it is this one."""
        found = []
        for path in self.path.parent.glob(f"{self.path.stem[:-8]}????????{self.path.suffix}"):
            with suppress(ArtifactError, AttributeError):  # damaged, or of an earlier version, which did not say it
                found.append(sorted(dict(self.provenance.items() - load(path).get("made_by").items())))
        return min(found, key=len, default=[])

    @property
    def is_current(self) -> bool:
        """Whether it is there, whole, and as it would be made."""
        with suppress(OSError, ArtifactError):
            status = self.path.stat()
            version = (self.provenance, status.st_ino, status.st_size, status.st_mtime_ns)
            if self.seen.get(self.path) != version:
                self.load()
                self.seen[self.path] = version
            return True
        return False


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a folder for one run, until the process ends, however that may be; without locks (Windows), not at all.

    Raises ArtifactError where another run holds it, and says which, or where the folder cannot be written to.
    """
    with ExitStack() as held:
        with naming(root / ".lock"):
            file = held.enter_context(open(root / ".lock", "a+", encoding="utf-8", errors="backslashreplace"))
            try:
                with suppress(ImportError):  # of Windows
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ArtifactError(f"{root}: is held by another run ({file.read().strip()}): wait or end it") from None
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}: {shlex.join(sys.argv)}\n")
            file.flush()
        for folder in ("checkpoints", "datasets", "eval", "reports"):
            for path in (root / folder).rglob(f"*{PARTIAL}"):  # half written, by a run that was killed
                path.unlink(missing_ok=True)
        yield


@dataclass(frozen=True)
class Log:
    """Says messages on the terminal and in a file. The prefix tells which process it is, where there are several."""

    path: Path
    prefix: str = ""

    def __call__(self, message: str) -> None:
        """Says it on both. Raises ArtifactError where the file cannot be written."""
        with suppress(OSError):  # nobody reads the terminal any more: `main.py | head`
            tqdm.write(f"{self.prefix}{message}")
            sys.stdout.flush()
        self.note(message)

    def note(self, message: str) -> None:
        """Says it in the file alone, with the time. Raises ArtifactError where that cannot be written."""
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.prefix}{message}\n")
