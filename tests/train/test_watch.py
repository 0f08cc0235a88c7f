"""No process waits for ever for another one that is gone, or that makes other gathers."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from lit_qlora import signals
from lit_qlora.errors import ResourceError
from lit_qlora.sharded import ShardedBase
from lit_qlora.train import watch
from lit_qlora.train.parallel import sum_gradients
from lit_qlora.train.watch import GONE, HURRIED, SILENT, Watch, home_of, is_gone
from tests.sharded.test_base import BLOCKS, base_of
from tests.train.test_parallel import Member, loopback

__all__ = ["loopback"]


class Group:
    """Processes that have begun so many collectives together."""

    def __init__(self, begun: int, name: str = "all") -> None:
        self.begun, self.group_name = begun, name

    def _get_sequence_number_for_group(self) -> int:
        return self.begun


TIMEOUT = 4 * watch.EVERY


def watches(processes: int = 2, timeout: float = 0.0) -> list[Watch]:
    store = distributed.HashStore()
    return [Watch(store, rank, processes, timeout=timeout) for rank in range(processes)]


def at(one: Watch, line: int, *groups: Group) -> None:
    """Let a process be at a line, after so many collectives."""
    one.where, one.groups = lambda: (line, f"line {line}"), list(groups)  # type: ignore[assignment]


def looks(some: list[Watch], times: int) -> list[str]:
    """What each says first, or at the last look."""
    said = [""] * len(some)
    for _ in range(times):
        for one in some:
            one.exchange()
        said = [before or one.look() for before, one in zip(said, some, strict=True)]
    return said


def test_processes_that_live_may_be_as_slow_as_they_like_without_a_timeout() -> None:
    assert looks(watches(3), 10 * SILENT) == ["", "", ""]


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


def test_a_process_that_stays_at_a_line_while_another_one_waits_ends_all_and_is_named() -> None:
    some = watches(3, TIMEOUT)
    at(some[0], 10, Group(7))
    at(some[1], 20, Group(6))
    at(some[2], 30, Group(7))
    assert looks(some, 4) == ["", "", ""]
    said = looks(some, 3)
    assert said[0] == (
        "Process 1 has not moved for 20 s (collective_timeout), and others wait for it. It is in line 20; process 0 "
        "is in line 10."
    )
    assert all("Process 1 has not moved for 20 s" in text for text in said[1:])


def test_one_that_moves_or_makes_collectives_may_take_its_time() -> None:
    some = watches(2, TIMEOUT)
    for i in range(40):
        at(some[0], 10, Group(100))
        at(some[1], 20 + i % 2, Group(6 + i // 2))
        assert looks(some, 3) == ["", ""]


def test_processes_that_nobody_waits_for_may_stay_at_a_line() -> None:
    some = watches(2, TIMEOUT)
    for i in range(40):
        at(some[0], i, Group(6))
        at(some[1], 20, Group(6))
        assert looks(some, 1) == ["", ""]


def test_only_collectives_of_a_common_group_count() -> None:
    some = watches(2, TIMEOUT)
    for i in range(40):
        at(some[0], i, Group(6), Group(50, "row 0"))
        at(some[1], 20, Group(6), Group(10, "row 1"))
        assert looks(some, 1) == ["", ""]
    for i in range(40, 46):
        at(some[0], i, Group(6), Group(50, "row"))
        at(some[1], 20, Group(6), Group(10, "row"))
        said = looks(some, 1)
    assert "Process 1 has not moved for 20 s" in said[0]


def test_collectives_that_torch_does_not_count_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    some = watches(2, TIMEOUT)
    monkeypatch.setattr(Group, "_get_sequence_number_for_group", raises)
    for i in range(40):
        at(some[0], i, Group(7))
        at(some[1], 20, Group(6))
        assert looks(some, 1) == ["", ""]


def raises(group: Group) -> int:
    raise RuntimeError("ProcessGroup ... does not yet support sequence numbers.")


def test_processes_that_all_wait_for_each_other_end_after_three_times_as_long() -> None:
    some = watches(2, TIMEOUT)
    at(some[0], 10, Group(6))
    at(some[1], 20, Group(6))
    assert looks(some, 12) == ["", ""]
    assert looks(some, 2)[0] == (
        "No process has moved for 60 s, 3 times collective_timeout: process 0 is in line 10; process 1 is in line 20."
    )


def test_a_process_that_has_ended_well_keeps_none_waiting() -> None:
    some = watches(2, TIMEOUT)
    at(some[0], 10, Group(7))
    at(some[1], 20, Group(6))
    looks(some, 2)
    some[1].leave()
    assert looks(some[:1], 40) == [""]


def test_a_line_of_this_package_is_told_and_the_one_that_it_waits_in() -> None:
    (seen, see), (told, tell) = os.pipe(), os.pipe()

    def wait() -> None:
        os.write(see, b"1") and os.read(told, 1)
        os.write(see, b"2") and os.read(told, 1)

    thread = threading.Thread(target=lambda: signals.StopRequest().unless_stopped(wait, None), daemon=True)
    thread.start()
    assert thread.ident
    places = []
    for _ in range(2):
        os.read(seen, 1)
        places += [watch.where(thread.ident), watch.where(thread.ident)]
        os.write(tell, b"1")
    assert places[0] == places[1] != places[2] == places[3]
    lines = [
        re.fullmatch(r"unless_stopped \(lit_qlora/signals.py:(\d+)\), in wait \(.*:(\d+)\)", line) for _, line in places
    ]
    first, *_, last = (tuple(map(int, found.groups())) for found in lines if found)
    assert last == (first[0], first[1] + 1)


Work = Callable[[ShardedBase, int], object]


def enter(rank: int, tmp_path: Path, what: Work, timeout: float) -> None:
    """Be a process of two, which watch each other ten times a second."""
    os.dup2(os.open(tmp_path / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    watch.EVERY = 0.1
    store = distributed.FileStore(str(tmp_path / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    watch._store = lambda fabric: distributed.PrefixStore("watch", distributed.FileStore(str(tmp_path / "store"), 2))
    with watch.watched(Member(rank, 2), "Resume.", timeout):  # type: ignore[arg-type]
        what(base_of(), rank)
        distributed.barrier()
    os._exit(0)


def outcome(tmp_path: Path, what: Work, timeout: float = 0.0) -> tuple[list[int], list[str]]:
    """The statuses of two processes, and what they said."""
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            try:
                enter(rank, tmp_path, what, timeout)
            finally:
                os._exit(1)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return statuses, [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]


def sum_one_gradient(rank: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    sum_gradients(Member(rank, 2), [parameter])  # type: ignore[arg-type]


def test_a_process_that_never_joins_a_sum_of_gradients_ends_the_run_and_is_named(tmp_path: Path) -> None:
    def read_samples() -> None:
        reader, _ = os.pipe()
        os.read(reader, 1)  # as of a file system that does not answer, or a debugger's user

    def work(base: ShardedBase, rank: int) -> None:
        if rank:
            read_samples()
        sum_one_gradient(rank)

    statuses, said = outcome(tmp_path, work, timeout=0.5)
    assert statuses == [ResourceError.status] * 2
    for text in said:
        assert "error: Process 1 has not moved for 0.5 s (collective_timeout), and others wait for it." in text
        assert "It is in read_samples (test_watch.py:" in text
        assert "; process 0 is in sum_gradients (lit_qlora/train/parallel.py:" in text
        assert text.endswith("So this process ends too. Resume.\n")


def test_a_process_that_ends_the_run_ends_first_those_that_it_started(tmp_path: Path) -> None:
    """One that is stopped would stay."""
    if not (first := os.fork()):
        try:
            watch.EVERY, watch.SILENT = 0.1, 2
            watch._store = lambda fabric: distributed.HashStore()
            store = distributed.FileStore(str(tmp_path / "store"), 1)
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            with watch.watched(Member(0, 2), "Resume.", 0.0, (tmp_path / "ended").touch):  # type: ignore[arg-type]
                signal.pause()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == ResourceError.status
    assert (tmp_path / "ended").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize("what", [skips, goes_ahead])
def test_a_process_that_makes_fewer_gathers_or_more_ends_the_run(tmp_path: Path, what: Work) -> None:
    statuses, said = outcome(tmp_path, what, timeout=0.5)
    assert statuses == [ResourceError.status] * 2
    assert all("need (lit_qlora/sharded/base.py:" in text for text in said)
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
def test_what_the_first_process_does_alone_may_take_its_time(tmp_path: Path) -> None:
    def save(files: int) -> None:
        time.sleep(0.03)
        if files:
            save(files - 1)

    def work(base: ShardedBase, rank: int) -> None:
        for _ in range(2):
            passes(base, *range(BLOCKS))
            if rank == 0:
                save(100)
            distributed.barrier()
            sum_one_gradient(rank)

    assert outcome(tmp_path, work, timeout=0.5) == ([0, 0], ["", ""])
