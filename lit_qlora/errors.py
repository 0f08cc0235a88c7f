"""The exceptions meant for people. Everything else is a bug of ours and keeps its traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message is one to three lines: the place, what is wrong, what to do. Entry points
    print it without a traceback and exit with `status`.
    """

    status = 2
    prefix = "error: "


class UsageError(UserError):
    """A flag, a config file or a combination of settings is wrong."""


class DataError(UserError):
    """The data set cannot be read, or nothing could be learnt from it."""

    status = 3


class CheckpointError(UserError):
    """A checkpoint, tokenizer or adapter is missing, damaged, or does not fit."""

    status = 4


class NumericalError(UserError):
    """The numbers went wrong: a loss or a gradient that is not finite."""

    status = 5


class ResourceError(UserError):
    """The machine lacks something: disk, memory, a permission."""

    status = 6


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """' Did you mean X?' for the nearest known word, or '' when none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
