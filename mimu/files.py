"""Files that are written whole, with a checksum, and read again without running any code in them."""

import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimu.errors import ArtifactError, in_one_line

PARTIAL = ".mimu-partial"  # how files end that are not whole yet
CHECKSUM_SIZE = 64


@contextmanager
def naming(path: Path, what: str = "written") -> Iterator[None]:
    """Turns an OSError into an ArtifactError that names the file and says what cannot be done with it."""
    try:
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
    with in_one_line(ArtifactError, f"{path}: is damaged or something else"):
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
