"""What holds for every input, however hostile: success, or a status and one clear message; within time and memory.

An input for which it does not hold becomes a file in `cases`, which stays: the quick suite tries it each time.

    LIT_QLORA_FUZZ_EXAMPLES=2000 LIT_QLORA_FUZZ_SEED=7 python -m pytest tests/fuzz -m slow

tries 2,000 other inputs of each kind.
"""

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

from lit_qlora.errors import UserError

CASES = Path(__file__).with_name("cases")
EXAMPLES = int(os.environ.get("LIT_QLORA_FUZZ_EXAMPLES", "200"))
SEED = int(os.environ.get("LIT_QLORA_FUZZ_SEED", "0"))
SECONDS = 20
"""Most time of the processor for one input."""
MOST_MEMORY = 2**30
"""Bytes by which one input may raise the memory that this process had at most."""
LONGEST_MESSAGE = 4000


def quick(examples: int) -> Callable[[Any], Any]:
    """Try the same few inputs each time."""
    return settings(_common(), max_examples=examples, derandomize=True)


def slow(function: Any) -> Any:
    """Try many inputs, which the seed decides."""
    return seed(SEED)(settings(_common(), max_examples=EXAMPLES)(function))


def _common() -> settings:
    return settings(
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


class BrokenError(AssertionError):
    """An input for which the property does not hold."""

    def __init__(self, kind: str, content: bytes, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind, self.content = kind, content


def holds(kind: str, content: bytes, use: Callable[[], object]) -> bool:
    """Use an input; True if it was accepted.

    Args:
        kind: what the input is, and the name of its folder in `cases`.
        content: the input.

    Raises:
        BrokenError: if it ended in anything but success, or a status with one message.
    """
    before, begun = _peak_memory(), process_time()
    message = ""
    try:
        use()
    except UserError as error:
        message = str(error)
        if not message.strip() or len(message) > LONGEST_MESSAGE:
            raise BrokenError(kind, content, f"a message of {len(message)} characters") from error
    except OSError as error:  # a command prints its file and its reason
        if error.filename is None and error.errno is None:
            raise BrokenError(kind, content, repr(error)) from error
        message = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or "pytest" in type(error).__module__:
            raise
        raise BrokenError(kind, content, repr(error)) from error
    if (spent := process_time() - begun) > SECONDS:
        raise BrokenError(kind, content, f"{spent:.0f} s")
    if (grown := _peak_memory() - before) > MOST_MEMORY:
        raise BrokenError(kind, content, f"{grown / 2**20:,.0f} MiB")
    return not message


@contextmanager
def kept() -> Iterator[None]:
    """Keep the input for which the property does not hold as a case."""
    try:
        yield
    except BrokenError as broken:
        file = CASES / broken.kind / hashlib.sha256(broken.content).hexdigest()[:12]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(broken.content)
        broken.add_note(f"{file.relative_to(CASES.parents[2])} holds it, and is tried each time from now on.")
        raise


def cases(kind: str) -> list[Path]:
    """Return the kept inputs of a kind."""
    return sorted((CASES / kind).glob("*"))


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
