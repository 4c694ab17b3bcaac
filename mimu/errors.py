"""Errors that name the thing, its value and what would be valid, in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """The user can correct this: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def shortened(text: str) -> str:
    """Cuts a text to 300 characters, and ends it in dots then."""
    return text if len(text) <= 300 else f"{text[:297]}..."


def named(classes: Sequence[int]) -> str:
    """Names classes, as in "class 3" or "classes 3, 7", `shortened`."""
    return shortened(f"class{'es' * (len(classes) > 1)} {', '.join(map(str, classes))}")


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, `shortened`."""
    return shortened(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def in_one_line(kind: type[ValueError], message: str) -> Iterator[None]:
    """Turns any error but an InputError into one of this kind, whose message is one line and ends with the cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise kind(f"{message} ({one_line(error)})") from error


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""
