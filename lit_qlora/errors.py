"""Errors that a user can fix. Any other exception is a bug of ours and keeps its traceback."""


class UserError(Exception):
    """An error that the user can fix.

    The message has one to three lines: the location, the fault, the remedy. A command prints it without a traceback
    and exits with `status`.
    """

    status = 2
    prefix = "error: "


class UsageError(UserError):
    """A flag, a config file or a combination of settings is wrong."""


class DataError(UserError):
    """The data set cannot be read, or holds nothing to train on."""

    status = 3


class CheckpointError(UserError):
    """A checkpoint, tokenizer or adapter is missing, damaged, or does not fit."""

    status = 4


class NumericalError(UserError):
    """A loss or a gradient is infinite or NaN."""

    status = 5


class ResourceError(UserError):
    """The machine lacks something: disk, memory, a permission."""

    status = 6


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ' Did you mean X?' for the nearest known word, or '' when none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
