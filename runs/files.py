"""Files that are written whole and know what made them, and the lock on the folder that they stand in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGE = Path(__file__).resolve().parents[1]
# Where runs find data sets and leave their files: the clone, but of an installed package the current folder.
ROOT = PACKAGE if (PACKAGE / "pyproject.toml").exists() else Path.cwd()
PARTIAL = ".mimu-partial"  # how files end that are not whole yet
CHECKSUM_SIZE = 64
BY_OTHERS = "made by other settings, code or data"


class InputError(ValueError):
    """What the user can mend: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def slug(name: str) -> str:
    """The name in letters, digits and underscores, as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@contextmanager
def naming(path: Path, what: str = "written", or_stream: bool = False) -> Iterator[None]:
    """Turns an OSError into an ArtifactError that names the file and says what cannot be done with it.

    So it does with what is no regular file, such as a FIFO, which would be waited for, but for one of `or_stream`.
    """
    try:
        if not or_stream and path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be {what} ({error.strerror or error})") from error


@contextmanager
def written_whole(path: Path) -> Iterator[io.BytesIO]:
    """A buffer whose content is the file once the context is left: all of it, or what was there before.

    It is written beside the file, flushed to the disk, and renamed; where the context raises, nothing is written.
    Raises ArtifactError where that cannot be done.
    """
    content = io.BytesIO()
    yield content
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with written_whole(path) as file:
        file.write(text.encode())


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON holds it, keys in order; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a dictionary whole: to a `.json` file as JSON, else as PyTorch writes a checkpoint, with a checksum."""
    with written_whole(path) as file:
        if path.suffix == ".json":
            content = content | {"checksum": digest(content)}
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
        else:
            import torch  # takes seconds, which the command line need not wait for

            # Readers of a zip archive skip the comment at its end; the field before it is the length of the comment.
            torch.save(content, file)
            file.seek(-2, io.SEEK_END)
            file.write(CHECKSUM_SIZE.to_bytes(2, "little"))
            file.write(hashlib.sha256(file.getvalue()).hexdigest().encode())


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` has written. No code of the file is run. Raises ArtifactError where a byte of it is another."""
    with naming(path, "read"):
        content = path.read_bytes()
    try:
        if path.suffix == ".json":
            loaded = json.loads(content)
            if loaded.pop("checksum", None) != digest(loaded):
                raise ValueError("it was changed after it was written")
        else:
            import torch

            if content[-CHECKSUM_SIZE:] != hashlib.sha256(content[:-CHECKSUM_SIZE]).hexdigest().encode():
                raise ValueError("it does not match its checksum")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ArtifactError(f"{path}: is damaged or something else ({one_line(error)})") from None
    return loaded


def code_of(root: Path, patterns: Iterable[str]) -> dict[str, str]:
    """File to the hash of its bytes, for all files under `root` that match a pattern such as `audits/*.py`."""
    paths = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sorted(paths.items())}


@dataclass(frozen=True)
class Artifact:
    """A file of a run, and a digest of all that decides what is in it: with any of that changed it is made anew.

    seen: which version of files was found to be whole, so that it is not read again only to find that out
    """

    path: Path
    made_by: str
    seen: dict[Path, tuple[str, int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def save(self, content: dict[str, Any]) -> None:
        save(self.path, content | {"made_by": self.made_by})

    def load(self) -> dict[str, Any]:
        """The content. Raises ArtifactError where it is not there, damaged, or made by something else."""
        content = load(self.path)
        if content.get("made_by") != self.made_by:
            raise ArtifactError(f"{self.path}: was {BY_OTHERS}")
        return content

    def why_not(self) -> str:
        """Why it is not there as it would be made, in words; "" where it is.

        Raises ArtifactError where something stands in its place that is not a file.
        """
        with naming(self.path, "read"):
            if not self.path.exists():
                return "not there yet"
            status = self.path.stat()
        version = (self.made_by, status.st_ino, status.st_size, status.st_mtime_ns)
        if self.seen.get(self.path) != version:
            try:
                self.load()
            except ArtifactError as error:
                return BY_OTHERS if str(error).endswith(BY_OTHERS) else "damaged or unreadable"
            self.seen[self.path] = version
        return ""

    @property
    def is_there(self) -> bool:
        """Whether it is there, whole, and as it would be made."""
        return not self.why_not()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a folder for one run. The system releases it when the process ends, however that may be.

    Where the system has no such locks (Windows), nothing is held.
    Raises ArtifactError where another run holds it, and says which, or where the folder cannot be written to.
    """
    with naming(root / ".lock"):
        file = open(root / ".lock", "a+", encoding="utf-8", errors="backslashreplace")
    with file:
        with naming(root / ".lock"):
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ArtifactError(f"{root}: is held by another run ({file.read().strip()}): wait or end it") from None
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}: {shlex.join(sys.argv)}\n")
            file.flush()
        remove_partial(root)
        yield


def remove_partial(root: Path) -> None:
    """Removes what a killed run has left half written beside its files."""
    for folder in ("checkpoints", "datasets", "eval", "reports"):
        for path in (root / folder).rglob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)
