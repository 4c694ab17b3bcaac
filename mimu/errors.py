"""Errors that name the thing, its value and what would be valid, in one line."""


class InputError(ValueError):
    """The user can correct this: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""
