"""A signal ends a command at once, with one line, unless something has to be saved first."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora import cli, signals
from lit_qlora.signals import SIGNALS, Interrupted, StopRequest, caught, held, left_to
from tests.test_cli import Config

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def ended(work: Callable[[], object], said: Path) -> int:
    """Exit status of a command that does this, in a process of its own; negative if it was killed."""
    child = os.fork()
    if child == 0:
        status: int | str | None = 99
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            cli.run(lambda config: work() and None, Config, [])
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(int(status or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_one_line_and_its_status(number: signal.Signals, tmp_path: Path) -> None:
    def work() -> None:
        try:
            send(number)
        finally:
            (tmp_path / "cleaned up").touch()
        (tmp_path / "went on").touch()

    assert ended(work, tmp_path / "said") == 128 + number
    assert (tmp_path / "said").read_text().strip() == signals.describe(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cleaned up", "said"]


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path) -> None:
    def work() -> None:
        send(signal.SIGTERM)

    with left_to(signal.SIG_IGN, signal.SIGTERM), caught() as stop:  # type: ignore[arg-type]
        work()
        assert stop.signal == 0


def test_what_is_held_ends_first(tmp_path: Path) -> None:
    def work() -> None:
        with held():
            send(signal.SIGTERM)
            (tmp_path / "saved").touch()
        (tmp_path / "went on").touch()

    assert ended(work, tmp_path / "said") == 143
    assert (tmp_path / "said").read_text().split("\n") == ["", "SIGTERM: saving ...", "stopped by SIGTERM", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "said"}


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_also_what_is_held(second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO", 0)
    stop = StopRequest()
    with stop.held():
        stop.take(signal.SIGTERM)
        with pytest.raises(Interrupted, match=signals.describe(second)):
            stop.take(second)
        stop.signal = 0  # answered


def test_the_same_signal_soon_after_is_an_echo_but_ctrl_c_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO", 1e9)
    stop = StopRequest()
    with stop.held():
        stop.take(signal.SIGTERM)
        stop.take(signal.SIGTERM)
        with pytest.raises(Interrupted, match="Ctrl-C"):
            stop.take(signal.SIGINT)
        stop.signal = 0  # answered


def test_what_is_released_ends_at_once_and_what_is_lifted_does_as_outside() -> None:
    stop = StopRequest()
    went = []
    with stop.held():
        with stop.held(), stop.lifted():
            stop.take(signal.SIGTERM)  # only noted: all is held outside too
            went.append(1)
        assert stop.unless_stopped(lambda: went.append(2), None) is None
        stop.signal = 0
        assert stop.unless_stopped(lambda: stop.take(signal.SIGHUP) or went.append(3), 7) == 7
        stop.signal = 0
    assert went == [1]
    with pytest.raises(Interrupted), stop.held(), stop.lifted():
        stop.take(signal.SIGTERM)


def test_a_call_that_does_not_return_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.02)

    def work() -> None:
        mutex = ctypes.create_string_buffer(256)
        try:
            send(signal.SIGTERM)
        finally:
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)

    assert ended(work, tmp_path / "said") == 143
    assert (tmp_path / "said").read_text() == "\nstopped by SIGTERM\n"


@pytest.mark.parametrize(
    ("came", "unsaved", "status"),
    [
        ([signal.SIGTERM], False, 143),
        ([signal.SIGTERM], True, 0),
        ([signal.SIGTERM, signal.SIGTERM], True, 0),  # an echo
        ([signal.SIGTERM, signal.SIGINT], True, 130),
    ],
)
def test_the_watcher_waits_for_what_has_to_be_saved_but_not_after_a_second_signal(
    came: list[int], unsaved: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    monkeypatch.setattr(signals, "ECHO", 1e9)

    def work() -> None:
        reader, writer = os.pipe()
        os.write(writer, bytes(came))
        os.close(writer)
        with caught() as stop, stop.held(), stop.released(saved=not unsaved):
            stop.watch(reader)

    assert ended(work, tmp_path / "said") == status


def test_the_signal_of_a_copy_of_the_process_does_not_end_the_command(tmp_path: Path) -> None:
    def work() -> None:
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    assert ended(work, tmp_path / "said") == 0


def test_the_watcher_leaves_alone_who_takes_a_signal_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.0)

    def work() -> None:
        reader, writer = os.pipe()
        os.write(writer, bytes([signal.SIGTERM]))
        os.close(writer)
        with caught() as stop, left_to(lambda *_: None, signal.SIGTERM):
            stop.watch(reader)

    assert ended(work, tmp_path / "said") == 0
