"""Errors that name the thing, its value and what would be valid, in one line."""


class InputError(ValueError):
    """The user can correct this: a setting, a file, a folder. The message says what and where, in one line."""


class ArtifactError(InputError):
    """A file that cannot be written, or that is not what it should be."""


def shortened(text: str) -> str:
    """Cuts a text to 300 characters, and ends it in dots then."""
    return text if len(text) <= 300 else f"{text[:297]}..."


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, `shortened`."""
    return shortened(" ".join(str(error).split())) or type(error).__name__


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""
