"""Files that are written whole and know what made them, and the lock on the folder that they stand in."""

from __future__ import annotations

import ast
import fcntl
import functools
import hashlib
import io
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
# As they are imported: what is edited while a run goes on counts for the next one.
SOURCES = {path: path.read_bytes() for path in ROOT.glob("*.py")}
PARTIAL = ".mimu-partial"  # how files end that are not whole yet


class InputError(ValueError):
    """What the user can mend: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def written_whole(path: Path) -> Iterator[io.BytesIO]:
    """A buffer whose content is the file once the context is left: all of it, or what was there before.

    It is written beside the file, flushed to the disk, and renamed; where the context raises, nothing is written.
    Raises ArtifactError where that cannot be done.
    """
    content = io.BytesIO()
    yield content
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    try:
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, outlives a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with written_whole(path) as file:
        file.write(text.encode())


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON holds it, keys in order; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a dictionary whole and with a checksum: to a `.json` file as JSON, else as PyTorch writes a checkpoint."""
    with written_whole(path) as file:
        if path.suffix == ".json":
            content = content | {"checksum": digest(content)}
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
        else:
            archive = io.BytesIO()
            torch.save(content, archive)
            file.write(with_checksum(archive.getvalue()))


CHECKSUM_SIZE = 64


def with_checksum(archive: bytes) -> bytes:
    """A zip archive with its SHA-256 as the comment at the end, which readers of checkpoints skip.

    The records have checksums of their own, but PyTorch does not look at them, and the directory has none.
    """
    content = archive[:-2] + CHECKSUM_SIZE.to_bytes(2, "little")  # the last field is the length of the comment
    return content + hashlib.sha256(content).hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` has written. No code of the file is run. Raises ArtifactError where a byte of it is another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        if path.suffix == ".json":
            loaded = json.loads(content)
            if loaded.pop("checksum", None) != digest(loaded):
                raise ValueError("it was changed after it was written")
        else:
            if content[-CHECKSUM_SIZE:] != hashlib.sha256(content[:-CHECKSUM_SIZE]).hexdigest().encode():
                raise ValueError("it does not match its checksum")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ArtifactError(f"{path}: is damaged or something else ({one_line(error)})") from None
    return loaded


def code_of(module: str, without: tuple[str, ...] = (), root: Path = ROOT) -> dict[str, str]:
    """File to the hash of its code, for a module of this project and all of this project that it imports.

    without: modules to leave out. Comments and the look of the code do not change a hash.
    """
    found: dict[str, str] = {}
    names = [module]
    while names:
        name = names.pop()
        for path in (root / f"{name.replace('.', '/')}.py", root / name.replace(".", "/") / "__init__.py"):
            file = path.relative_to(root).as_posix()
            if file not in found and name not in without and path.exists():
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                found[file], imports = code_and_imports(SOURCES.get(path) or path.read_bytes(), package)
                names += imports
    return dict(sorted(found.items()))


@functools.cache
def code_and_imports(source: bytes, package: str) -> tuple[str, list[str]]:
    """The hash of the code of a file in a package ("": in none), and all that its imports may be names of."""
    tree = ast.parse(source)
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            imports += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    # A package is imported before what is in it.
    parts = [name.split(".") for name in imports]
    parents = [".".join(of_name[:end]) for of_name in parts for end in range(1, len(of_name) + 1)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], list(dict.fromkeys(parents))


NOT_THERE = "not there yet"


@dataclass(frozen=True)
class Artifact:
    """A file of a run and what it depends on: with any of that changed it is another, and made anew.

    made_by: `settings`, the part of the config with the seed; `code`, a hash for every source file; `data`, a checksum
        for every file of the data set; `torch`, the version. All as JSON holds it.
    """

    path: Path
    made_by: dict[str, Any]

    def save(self, content: dict[str, Any]) -> None:
        save(self.path, content | {"made_by": self.made_by})

    def load(self) -> dict[str, Any]:
        """The content. Raises ArtifactError where it is not there, damaged, or made by something else."""
        content = load(self.path)
        if difference := changes(content.get("made_by"), self.made_by):
            raise ArtifactError(f"{self.path}: {difference}")
        return content

    def why_not(self) -> str:
        """Why it has to be made, in a few words; nothing where it is there as it would be made."""
        if not self.path.exists():
            return NOT_THERE
        try:
            content = load(self.path)
        except ArtifactError:
            return "damaged"
        return changes(content.get("made_by"), self.made_by)


def changes(before: Any, now: dict[str, Any]) -> str:
    """What differs between two `made_by`, in a few words."""
    if before == now:
        return ""
    if not isinstance(before, dict) or set(before) != set(now):
        return "made by another version"
    if not now["data"]:
        return "data set not there"
    if before["code"] != now["code"] and isinstance(before["code"], dict):
        files = sorted(name for name, _ in before["code"].items() ^ now["code"].items())
        return f"{', '.join(dict.fromkeys(files))} changed"
    return f"{', '.join(name for name in now if before[name] != now[name])} changed"


def short(settings: dict[str, Any]) -> str:
    """Eight hexadecimal digits that tell settings apart in the names of files."""
    return digest(settings)[:8]


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a folder for one run. The system releases it when the process ends, however that may be.

    Raises ArtifactError where another run holds it, and says which, or where the folder cannot be written to.
    """
    path = root / ".lock"
    while True:
        try:
            file = open(path, "a+")
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ArtifactError(f"{root}: is held by another run ({holder}): wait or end it") from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # clean.sh has removed it in between
    with file:
        remove_partial(root)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}: {shlex.join(sys.argv)}\n")
            file.flush()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from None
        yield


def make_folders(root: Path) -> None:
    """Makes the folders of a run's files. Raises ArtifactError where one cannot be made or written to."""
    for name in ("checkpoints", "datasets/Graphs", "eval", "reports"):
        folder = root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be made ({error.strerror or error})") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ArtifactError(f"{folder}: cannot be written to")


def remove_partial(root: Path) -> None:
    """Removes what a killed run has left half written beside its files."""
    for folder in ("checkpoints", "datasets", "eval", "reports"):
        for path in (root / folder).rglob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)
