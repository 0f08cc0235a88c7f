"""Signals that end a run between two steps, after it has saved."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lit_qlora.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""From a batch system or `kill`, from Ctrl-C, from a closing terminal, from Slurm's `--signal=B:USR1@120`."""
TWICE = 5.0  # seconds; a second Ctrl-C within them ends the program at once


class Stopped(UserError):  # noqa: N818 - not an error, but it ends the run like one
    """A signal ended the run; everything is saved."""

    prefix = ""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}; go on with --resume auto")
        self.status = 128 + number


class StopRequest:
    """A request to stop.

    Attributes:
        signal: number of the first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._interrupted = -math.inf  # when Ctrl-C came

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now, before = time.monotonic(), self._interrupted
            if now - before < TWICE:
                raise KeyboardInterrupt
            self._interrupted = now
        self.signal = self.signal or number
        # A signal may come in the middle of a print, so nothing buffered is written here. With SIGHUP the terminal may
        # be gone.
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step ...\n".encode())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note signals instead of dying of them; a signal that the parent ignores (nohup: SIGHUP) remains ignored."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, request._take)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
