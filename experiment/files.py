"""Files that are written whole and know what made them, the lock on their folder, and the log of a run."""

import ast
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimu.errors import ArtifactError
from mimu.files import PARTIAL, digest, load, naming, save

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def slug(name: str) -> str:
    """Returns the name in letters, digits and underscores, 60 at most, as the names of files contain it."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60]


@cache
def without_docstrings(source: bytes) -> str:
    """Returns a digest of the syntax tree of Python code without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return digest(ast.dump(tree))


def code_of(root: Path, modules: Iterable[str], without: Iterable[str] = ()) -> str:
    """Returns a digest of the code of modules and of all that they import from the same folder.

    Comments, docstrings and blank lines do not count.

    Args:
        root: The folder that holds the modules.
        modules: The modules to start with.
        without: Modules and packages that do not count, nor what only they import.
    """
    finder = ModuleFinder([str(root)], excludes=[*without])
    for name in modules:
        finder.import_hook(name)
    paths = [Path(module.__file__) for module in finder.modules.values() if module.__file__]
    return digest({path.relative_to(root).as_posix(): without_docstrings(path.read_bytes()) for path in paths})


@cache
def stored_provenance(path: Path, inode: int, size: int, modified: int) -> Any:
    """Returns the provenance that one version of a file contains. Raises ArtifactError where it is damaged."""
    return load(path).get("made_by")


@dataclass(frozen=True)
class Artifact:
    """A file of a run. It is made again where anything that decides its content has changed.

    Args:
        path: The place of the file.
        provenance: A digest of the settings, the code, the data and the version of PyTorch that make it.
    """

    path: Path
    provenance: str

    def save(self, content: dict[str, Any]) -> None:
        """Writes the file. Raises ArtifactError where that is not possible."""
        save(self.path, content | {"made_by": self.provenance})

    def load(self) -> dict[str, Any]:
        """Reads the file. Raises ArtifactError where it is missing, damaged, or made by something else."""
        content = load(self.path)
        if content.get("made_by") != self.provenance:
            raise ArtifactError(f"{self.path}: was made by other settings, code or data")
        return content

    @property
    def is_current(self) -> bool:
        """True where the file exists, is whole, and would be made the same again."""
        with suppress(OSError, ArtifactError):
            status = self.path.stat()
            # Read once, though often asked for.
            stored = stored_provenance(self.path, status.st_ino, status.st_size, status.st_mtime_ns)
            return stored == self.provenance
        return False


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Reserves a folder for one run until the process ends. Without locks (Windows), nothing is reserved.

    Raises:
        ArtifactError: Another run, which the message names, works there; or the folder cannot be written to.
    """
    with naming(root / ".lock"):
        file = open(root / ".lock", "a+", encoding="utf-8", errors="backslashreplace")
    with file:
        with naming(root / ".lock"):
            try:
                with suppress(ImportError):  # Windows has no fcntl
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ArtifactError(f"{root}: is held by another run ({file.read().strip()}): wait or end it") from None
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)}", file=file, flush=True)
        for folder in ("checkpoints", "datasets", "eval", "reports"):
            for path in (root / folder).rglob(f"*{PARTIAL}"):  # half written by a run that was killed
                path.unlink(missing_ok=True)
        yield


@dataclass(frozen=True)
class Log:
    """A log on the terminal and in a file.

    Args:
        path: The file.
        prefix: The process that writes, where there are several.
    """

    path: Path
    prefix: str = ""

    def __call__(self, message: str) -> None:
        """Writes a message to both. Raises ArtifactError where the file cannot be written."""
        with suppress(OSError):  # the terminal may be closed, as with `main.py | head`
            tqdm.write(f"{self.prefix}{message}")
            sys.stdout.flush()
        self.note(message)

    def note(self, message: str) -> None:
        """Writes a message with the time to the file alone. Raises ArtifactError where it cannot be written."""
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.prefix}{message}\n")
