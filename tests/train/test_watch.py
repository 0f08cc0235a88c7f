"""No process waits for ever for another one that is gone, or that makes other gathers."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from lit_qlora.errors import ResourceError
from lit_qlora.sharded import ShardedBase
from lit_qlora.train import watch
from lit_qlora.train.watch import GONE, HURRIED, SILENT, STUCK, Watch, home_of, is_gone
from tests.sharded.test_base import BLOCKS, base_of
from tests.train.test_parallel import Member, loopback

__all__ = ["loopback"]


class Waiting:
    """Gathers: so many have begun, and the last of them has not come about."""

    def __init__(self, gathers: int) -> None:
        self.gathers = gathers

    def unfinished(self) -> int | None:
        return self.gathers or None


def watches(processes: int = 2) -> list[Watch]:
    store = distributed.HashStore()
    return [Watch(store, rank, processes) for rank in range(processes)]


def looks(some: list[Watch], times: int) -> list[str]:
    """What each says first, or at the last look."""
    said = [""] * len(some)
    for _ in range(times):
        for one in some:
            one.exchange()
        said = [before or one.look() for before, one in zip(said, some, strict=True)]
    return said


def test_processes_that_live_and_wait_for_no_gather_may_be_as_slow_as_they_like() -> None:
    assert looks(watches(3), 10 * STUCK) == ["", "", ""]


def test_a_process_that_is_silent_is_named_by_all_others() -> None:
    some = watches(3)
    looks(some, 2)
    assert looks(some[:2], SILENT - 1) == ["", ""]
    assert all("Process 2 was not heard of for 100 s" in said for said in looks(some[:2], 2))


def test_a_process_that_never_spoke_is_silent_too() -> None:
    assert "Process 1 was not heard of" in looks(watches()[:1], SILENT + 1)[0]


def test_a_process_that_is_to_stop_waits_for_less_long() -> None:
    some = watches()
    looks(some, 2)
    (left,) = some[:1]
    assert [bool(left.look(stops=True)) for _ in range(HURRIED)] == [False] * (HURRIED - 1) + [True]


def test_a_process_on_this_machine_that_ended_is_noticed_after_a_few_looks() -> None:
    child = os.fork() or os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    own, other = home_of(os.getpid()), home_of(child)
    store = distributed.HashStore()
    some = [Watch(store, rank, 2, home) for rank, home in enumerate((own, other))]
    assert looks(some, GONE + 2)[0] == "Process 1 has ended."
    os.waitpid(child, 0)
    assert is_gone(other, own)
    assert not is_gone(own, own)
    assert is_gone(own.rpartition(" ")[0] + " 1", own)  # its id is another one's now
    assert not is_gone(f"elsewhere {child} 1", own)
    assert not is_gone("", own)


def test_a_process_that_is_done_is_not_missed() -> None:
    some = watches()
    looks(some, 2)
    some[1].leave()
    assert looks(some[:1], 2 * SILENT) == [""]


def test_a_gather_that_never_comes_about_ends_all_processes() -> None:
    some = watches()
    some[0].gathers, some[1].gathers = Waiting(42), Waiting(0)  # type: ignore[assignment]
    assert looks(some, STUCK) == ["", ""]
    first, second = looks(some, 2)
    assert first == second
    assert "Process 0 has waited for 120 s for gather 42" in first
    assert "process 1 has begun 0" in first


def test_gathers_that_come_about_one_after_the_other_raise_no_alarm() -> None:
    (alone,) = watches(1)
    for gather in range(2 * STUCK):
        alone.gathers = Waiting(1 + gather // (STUCK - 1))  # type: ignore[assignment]
        assert not alone.look()


def enter(rank: int, tmp_path: Path, what: Callable[[ShardedBase, int], object]) -> None:
    """Be a process of two, which watch each other ten times a second."""
    os.dup2(os.open(tmp_path / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    watch.EVERY = 0.1
    store = distributed.FileStore(str(tmp_path / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    watch._store = lambda fabric: distributed.PrefixStore("watch", distributed.FileStore(str(tmp_path / "store"), 2))
    with watch.watched(Member(rank, 2), "Resume.") as watching:  # type: ignore[arg-type]
        watching.gathers = base = base_of()
        what(base, rank)
        distributed.barrier()
    os._exit(0)


def outcome(tmp_path: Path, what: Callable[[ShardedBase, int], object]) -> tuple[list[int], list[str]]:
    """The statuses of two processes, and what they said."""
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            try:
                enter(rank, tmp_path, what)
            finally:
                os._exit(1)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return statuses, [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]


def passes(base: ShardedBase, *blocks: int) -> None:
    base.begin()
    for block in blocks:
        base.need(block)


def skips(base: ShardedBase, rank: int) -> None:
    """The other process goes on to the end of its pass, and waits."""
    passes(base, *range(BLOCKS - 2 * rank))


def goes_ahead(base: ShardedBase, rank: int) -> None:
    passes(base, *range(BLOCKS))
    if rank:
        passes(base, 0)


def stops(base: ShardedBase, rank: int) -> None:
    passes(base, 0, 1)
    if rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    passes(base, *range(BLOCKS))


@pytest.mark.parametrize("what", [skips, pytest.param(goes_ahead, marks=pytest.mark.slow)])
def test_a_process_that_makes_fewer_gathers_or_more_ends_the_run(tmp_path: Path, what: Any) -> None:
    watch.STUCK, before = 5, watch.STUCK
    try:
        statuses, said = outcome(tmp_path, what)
    finally:
        watch.STUCK = before
    assert statuses == [ResourceError.status] * 2
    assert all("of the base's weights, which the others do not take part in" in text for text in said)
    assert all(text.endswith("So this process ends too. Resume.\n") for text in said)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other(tmp_path: Path) -> None:
    def work(base: ShardedBase, rank: int) -> None:
        (tmp_path / f"pid-{rank}").write_text(str(os.getpid()))
        stops(base, rank)

    if not (helper := os.fork()):  # continues the one that was stopped, once the other has ended
        try:
            while not (tmp_path / "said-0").exists() or "error" not in (tmp_path / "said-0").read_text():
                time.sleep(0.05)
            time.sleep(1)
            os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGCONT)
        finally:
            os._exit(0)
    statuses, said = outcome(tmp_path, work)
    os.waitpid(helper, 0)
    assert statuses[0] == ResourceError.status
    assert statuses[1] != 0
    assert "Process 1 was not heard of" in said[0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_wherever_it_waits(tmp_path: Path) -> None:
    def work(base: ShardedBase, rank: int) -> None:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # as in a collective of NCCL, which notices nothing

    statuses, said = outcome(tmp_path, work)
    assert statuses == [ResourceError.status, -signal.SIGKILL]
    assert said[0] == "\nerror: Process 1 has ended.\nSo this process ends too. Resume.\n"


@pytest.mark.slow
def test_a_process_may_be_slow_between_passes(tmp_path: Path) -> None:
    def work(base: ShardedBase, rank: int) -> None:
        for _ in range(2):
            passes(base, *range(BLOCKS))
            distributed.barrier()
            time.sleep(3 * (rank == 0))
            distributed.barrier()

    watch.STUCK, before = 5, watch.STUCK
    try:
        assert outcome(tmp_path, work) == ([0, 0], ["", ""])
    finally:
        watch.STUCK = before
