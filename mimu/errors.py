"""Errors that name the thing, its value and what would be valid, in one line."""

from __future__ import annotations


class InputError(ValueError):
    """What the user can mend: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class DataError(InputError):
    """A data set that is not there and cannot be had, or whose files are not what they should be."""


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""
