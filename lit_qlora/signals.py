"""Signals that end a command: at once where nothing has to be saved, else as soon as it is saved.

A handler runs only between two instructions of Python. But a call may take long to return, such as a large product of
matrices or the end of a library's threads. There a watcher, a thread that the kernel tells of each signal, ends the
command.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""From a batch system or `kill`, from Ctrl-C, from a closing terminal, from Slurm's `--signal=B:USR1@120`."""
PATIENCE = 1.0
"""Seconds that a command gets to clean up before the watcher ends it; what is left over goes at the next start."""
ECHO = 1.0
"""Seconds within which a signal is taken for the first one again: launchers forward what their processes got too."""
Result = TypeVar("Result")

os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals do not concern the watcher


class Interrupted(BaseException):
    """A signal ends the command. As with KeyboardInterrupt, no `except Exception` keeps it.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(describe(number))
        self.number = number


def describe(number: int) -> str:
    """Describe the end of a command."""
    return f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"


class _Mode(NamedTuple):
    held: bool
    """The first signal is noted."""
    unsaved: bool
    """Something has to be saved, so the watcher waits."""


class StopRequest:
    """A request to stop. The first signal raises Interrupted wherever the program is, unless it is held.

    A second signal raises it in any case; Ctrl-C always counts as one, another signal only if it is no echo.

    Attributes:
        signal: number of the first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._came = 0.0
        self._process = os.getpid()
        self._modes = [_Mode(held=False, unsaved=False)]

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        if os.getpid() != self._process:  # a copy of ours that a library has made, to be ended as it likes
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self._came = number, time.monotonic()
            if not self._modes[-1].held:
                raise Interrupted(number)
            # A signal may come in the middle of a print, so nothing buffered is written here.
            _say(f"{signal.Signals(number).name}: saving ...")
        elif not self._is_echo(number):
            raise Interrupted(number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal:
            raise Interrupted(self.signal)

    @contextmanager
    def held(self) -> Iterator["StopRequest"]:
        """Note a signal inside, and raise Interrupted at the end, if it was not answered before."""
        with self._in(_Mode(held=True, unsaved=True)):
            yield self
        if not self._modes[-1].held:
            self.check()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside `held`, do as outside of it."""
        with self._in(self._modes[-2]):
            if not self._modes[-1].held:
                self.check()
            yield

    @contextmanager
    def released(self, saved: bool = False) -> Iterator[None]:
        """Raise Interrupted inside, although all around is held.

        Args:
            saved: there is nothing to save, so the watcher need not wait.
        """
        with self._in(_Mode(held=False, unsaved=self._modes[-1].unsaved and not saved)):
            self.check()
            yield

    def unless_stopped(self, work: Callable[[], Result], otherwise: Result, saved: bool = False) -> Result:
        """Return what `work` does, or `otherwise` if a signal stops it; see released."""
        try:
            with self.released(saved):
                return work()
        except Interrupted:
            return otherwise

    def watch(self, pipe: int) -> None:
        """End the program after each signal whose number comes through `pipe`, unless it ends or saves by itself."""
        first, came = 0, 0.0
        while byte := os.read(pipe, 1):
            number, now = byte[0], time.monotonic()
            if signal.getsignal(number) != self.take:  # a server or a conversation takes it
                continue
            again = bool(first) and (number != first or number == signal.SIGINT or now - came > ECHO)
            if not first:
                first, came = number, now
            if again or not self._modes[-1].unsaved:
                time.sleep(PATIENCE)
                if again or not self._modes[-1].unsaved:
                    _say(describe(number))
                    os._exit(128 + number)
        os.close(pipe)

    def _is_echo(self, number: int) -> bool:
        return number == self.signal != signal.SIGINT and time.monotonic() - self._came < ECHO

    @contextmanager
    def _in(self, mode: "_Mode") -> Iterator[None]:
        try:
            self._modes.append(mode)
            yield
        finally:
            self._modes.pop()


@contextmanager
def caught() -> Iterator[StopRequest]:
    """Take the signals inside, unless that is done already. In a thread, none comes."""
    if request := _taker():
        yield request
        return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=request.watch, args=(reader,), daemon=True, name="signals").start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        with left_to(request.take, *SIGNALS):
            yield request
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # which ends the watcher


@contextmanager
def left_to(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """Let `handler` take these signals inside; one that the parent ignores (nohup: SIGHUP) stays ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


@contextmanager
def held() -> Iterator[StopRequest]:
    """Let no first signal interrupt what is inside, which takes little time; it is answered at the end."""
    main = threading.current_thread() is threading.main_thread()  # no signal comes elsewhere
    with ((main and _taker()) or StopRequest()).held() as request:
        yield request


def taken() -> int:
    """Return the number of the signal that this program is to end by, or 0; any thread may ask."""
    request = _taker()
    return request.signal if request else 0


def _taker() -> StopRequest | None:
    """Return the request that takes this process's signals, if one does."""
    owners = (getattr(signal.getsignal(number), "__self__", None) for number in SIGNALS)
    return next((owner for owner in owners if isinstance(owner, StopRequest)), None)


def _say(text: str) -> None:
    with suppress(OSError):  # with SIGHUP the terminal may be gone
        os.write(2, f"\n{text}\n".encode())
