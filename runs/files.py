"""Files that are written whole and know what made them, the lock on their folder, and the log of a run."""

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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

PACKAGE = Path(__file__).resolve().parents[1]
# Where runs find data sets and leave their files: the clone, but of an installed package the current folder.
ROOT = PACKAGE if (PACKAGE / "pyproject.toml").exists() else Path.cwd()
PARTIAL = ".mimu-partial"  # how files end that are not whole yet
CHECKSUM_SIZE = 64


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
def naming(path: Path, what: str = "written") -> Iterator[None]:
    """Turns an OSError into an ArtifactError that names the file and says what cannot be done with it."""
    try:
        if what == "read" and path.is_fifo():
            raise OSError("it is a pipe")  # which would be waited for
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be {what} ({error.strerror or error})") from error


@contextmanager
def written_whole(path: Path) -> Iterator[io.BytesIO]:
    """A buffer whose content is the file once the context is left: all of it, or what was there before.

    It is written beside the file, flushed to the disk, and renamed. Raises ArtifactError where that cannot be done.
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
    """SHA-256 of a value as JSON holds it, keys in order; 64 hexadecimal digits. Raises ValueError on NaN."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a dictionary whole: to a `.json` file as JSON, else as PyTorch writes a checkpoint, with a checksum."""
    with written_whole(path) as file:
        if path.suffix == ".json":
            file.write(json.dumps(content | {"checksum": digest(content)}, indent=1, allow_nan=False).encode())
            return
        import torch  # takes seconds, which the command line need not wait for

        torch.save(content, file)
        # Into the comment that ends a zip archive, after its length. The CRC in it leaves out where the tensors are.
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
            return loaded
        import torch

        if content[-CHECKSUM_SIZE:] != hashlib.sha256(content[:-CHECKSUM_SIZE]).hexdigest().encode():
            raise ValueError("it does not match its checksum")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
        return loaded
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ArtifactError(f"{path}: is damaged or something else ({one_line(error)})") from None


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

    made_by: digests of this: of settings, the code, the data, PyTorch
    seen: which version of files was found to be whole, so that it is not read again only to find that out
    """

    path: Path
    made_by: dict[str, str]
    seen: dict[Path, tuple[dict[str, str], int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def save(self, content: dict[str, Any]) -> None:
        save(self.path, content | {"made_by": self.made_by})

    def load(self) -> dict[str, Any]:
        """The content. Raises ArtifactError where it is not there, damaged, or made by something else."""
        content = load(self.path)
        if content.get("made_by") != self.made_by:
            raise ArtifactError(f"{self.path}: was made by other settings, code or data")
        return content

    def differences(self) -> list[str]:
        """What was other when the most alike of the files that are there was made; nothing where it is this one."""
        found = []
        for path in self.path.parent.glob(f"{self.path.stem[:-8]}????????{self.path.suffix}"):
            with suppress(ArtifactError, AttributeError):  # damaged, or of an earlier version, which did not say it
                found.append(sorted(dict(self.made_by.items() - load(path).get("made_by").items())))
        return min(found, key=len, default=[])

    @property
    def is_there(self) -> bool:
        """Whether it is there, whole, and as it would be made."""
        with suppress(OSError, ArtifactError):
            status = self.path.stat()
            version = (self.made_by, status.st_ino, status.st_size, status.st_mtime_ns)
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
