"""Processes of a run watch each other, so that none waits for ever.

A collective waits until all processes take part. Gloo notices that one of them died, but NCCL does not. Neither
notices that one never comes, or makes other collectives. Up to the timeout of their group nothing is said.

So each process tells the others every few seconds, by the group's store, that it lives. It also tells how many
collectives it has begun, and which line it is at. A process ends with a message once another one on its machine is
gone, or was silent for 100 seconds. It also ends once another one has begun fewer collectives and stayed at one line
for as long as collective_timeout says: in a debugger, or at data that do not come.

A slow process lives and moves from line to line. So validations, checkpoints, answers and compilers may take as long as
they like. The group's own timeout would end them, so it is a day here.

A graceful stop waits for the end of a step, which does not come where another process is gone. torchrun, which sends
SIGTERM then, kills after 30 seconds; so a process that is to stop takes a shorter silence for an end.

Time is counted in looks. So a machine that slept, or a process that was stopped and continued, raises no alarm.
"""

import json
import math
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import NamedTuple

from lightning.fabric import Fabric
from torch import distributed
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout

from lit_qlora import signals
from lit_qlora.errors import ResourceError

EVERY = 5.0
"""Seconds between two looks."""
SILENT = 20
"""Looks after which a process that said nothing is taken for dead. A compiler may hold Python for as long."""
HURRIED = 4
"""The same in a process that is to stop."""
GONE = 2
"""Looks after the first one at which a process on this machine was gone; one that is done says so meanwhile."""
ALL = 3
"""Times collective_timeout, after which all processes are taken for stuck if none of them has moved. They may wait for
a GPU meanwhile."""
DONE = "done"
"""Said by a process that needs the others no more."""
DAY = timedelta(days=1)
PACKAGE = Path(__file__).parents[1]
_REASON = "reason"
_HOME = "home-"


class Told(NamedTuple):
    """A report of a process on itself."""

    beats: int
    """Times that it told something."""
    begun: dict[str, int]
    """Name of each group of processes that it belongs to -> collectives of the group that it has begun."""
    stack: int
    """Another number once its thread is at another line."""
    line: str
    """Where it is."""


class Watch:
    """The look of a process at the others. Make it in the thread that computes.

    Args:
        store: which all processes share.
        home: of this process, see home_of; "" for none.
        timeout: collective_timeout.

    Attributes:
        groups: of processes, whose collectives count.
        reason: for all processes to end; "" for none.
    """

    def __init__(self, store: Store, rank: int, processes: int, home: str = "", timeout: float = 0.0) -> None:
        self.store, self.rank, self.home = store, rank, home
        self.groups: list[ProcessGroup] = []
        self.reason = ""
        self.looks = math.ceil(timeout / EVERY)
        self.own = Told(0, {}, 0, "")
        self.where = partial(where, threading.get_ident())
        self._heard = {other: "" for other in range(processes) if other != rank}
        self._homes = dict.fromkeys(self._heard, "")
        self._unchanged = {other: _Unchanged() for other in self._heard}
        self._gone = {other: _Unchanged() for other in self._heard}
        self._missing = {other: _Unchanged() for other in self._heard}
        self._all = _Unchanged()

    def exchange(self) -> None:
        """Tell the others of this process, and why it ends, and hear the same of them."""
        self.own = self._now()
        self.store.set(f"{_HOME}{self.rank}", self.home)
        self.store.set(str(self.rank), json.dumps(self.own))
        if self.reason:
            self.store.set(_REASON, self.reason)
        for other in self._heard:
            self._heard[other] = self._said(str(other))
            self._homes[other] = self._homes[other] or self._said(f"{_HOME}{other}")
        self.reason = self.reason or self._said(_REASON)

    def follow(self, group: ProcessGroup) -> None:
        """Count the collectives of a group of processes, and let them take as long as their processes move."""
        _set_pg_timeout(DAY, group)
        self.groups.append(group)

    def leave(self) -> None:
        """Tell the others that this process needs them no more."""
        self.store.set(str(self.rank), DONE)

    def look(self, stops: bool = False) -> str:
        """The reason to end, for all processes; "" if there is none.

        Args:
            stops: this process got a signal, and waits for the end of a step.
        """
        self.reason = self.reason or self._end() or self._silence(HURRIED if stops else SILENT) or self._standstill()
        return self.reason

    def _now(self) -> Told:
        begun = {str(group.group_name): _begun(group) for group in self.groups}
        return Told(self.own.beats + 1, begun, *self.where())

    def _end(self) -> str:
        for other, said in self._heard.items():
            gone = said != DONE and is_gone(self._homes[other], self.home)
            if self._gone[other].looks(gone) >= GONE and gone:
                return f"Process {other} has ended."
        return ""

    def _silence(self, most: int) -> str:
        for other, said in self._heard.items():
            if self._unchanged[other].looks(said) >= most and said != DONE:
                return f"Process {other} was not heard of for {_seconds(most)} s: it ended, or lost the network."
        return ""

    def _standstill(self) -> str:
        """Why this process waits in vain for another one, or all do for each other."""
        told = {other: Told(*json.loads(said)) for other, said in self._heard.items() if said not in ("", DONE)}
        for other, one in told.items():
            missing = any(one.begun.get(group, count) < count for group, count in self.own.begun.items())
            still = self._missing[other].looks((one.begun, one.stack) if missing else None)
            if missing and 0 < self.looks <= still:
                return (
                    f"Process {other} has not moved for {_seconds(self.looks)} s (collective_timeout), and others wait "
                    f"for it. It is in {one.line}; process {self.rank} is in {self.own.line}."
                )
        told[self.rank] = self.own
        still = self._all.looks([(one.begun, one.stack) for one in told.values()])
        if len(told) > len(self._heard) and 0 < ALL * self.looks <= still:
            lines = "; ".join(f"process {other} is in {one.line}" for other, one in sorted(told.items()))
            return f"No process has moved for {_seconds(still)} s, {ALL} times collective_timeout: {lines}."
        return ""

    def _said(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _begun(group: ProcessGroup) -> int:
    """Collectives that this process has begun in a group. torch counts those of gloo and NCCL; of others it is 0."""
    try:
        return group._get_sequence_number_for_group()  # type: ignore[attr-defined] # its types lack it
    except RuntimeError:
        return 0


class _Unchanged:
    """Counts the looks at which something was as before."""

    def __init__(self) -> None:
        self._value: object = None
        self._looks = 0

    def looks(self, value: object) -> int:
        self._looks = self._looks + 1 if value == self._value else 0
        self._value = value
        return self._looks


def home_of(pid: int) -> str:
    """Name a process for others on its machine: the machine, where its ids count, the id, and the start; "" if unknown.

    Where a container has ids of its own, no process outside of it can tell anything by them.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{machine} {os.readlink('/proc/self/ns/pid')} {pid} {_state(pid)[1]}"
    except OSError:
        return ""


def is_gone(home: str, own: str) -> bool:
    """Tell whether the process with this home has ended, as far as the one with home `own` can see."""
    *machine, pid, start = home.split() or ("", "")
    if not home or machine != own.split()[:-2]:
        return False
    try:
        state, started = _state(int(pid))
    except OSError:
        return True
    return state in "ZX" or started != start


def _state(pid: int) -> tuple[str, str]:
    """The state of a process, Z for one that is dead and not yet buried, and its start in ticks since that of Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def where(thread: int) -> tuple[int, str]:
    """A number for all lines that a thread is at, and the innermost of them in words; one of this package if it can be.

    The number is of torch's own threads, too, which compute gradients. Python does not know them.
    """
    others = {one.ident for one in threading.enumerate()} - {thread}
    now = {ident: frame for ident, frame in sys._current_frames().items() if ident not in others}
    lines = [(frame.f_code.co_filename, line) for first in now.values() for frame, line in walk_stack(first)]
    frames = [frame for frame, _ in walk_stack(now[thread])]
    own = next((frame for frame in frames if Path(frame.f_code.co_filename).is_relative_to(PACKAGE)), frames[0])
    return hash(tuple(lines)), _described(own) + (f", in {_described(frames[0])}" if own is not frames[0] else "")


def _described(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path.name
    return f"{frame.f_code.co_name} ({shown}:{frame.f_lineno})"


@contextmanager
def watched(fabric: Fabric, advice: str, timeout: float, end: Callable[[], None] | None = None) -> Iterator[Watch]:
    """Let the processes of a run watch each other inside; all end at once where one of them would wait for ever.

    Args:
        advice: ends the message.
        timeout: collective_timeout.
        end: ends the processes that this one started; one that is stopped does not end by itself.
    """
    if fabric.world_size == 1:
        yield Watch(HashStore(), 0, 1)
        return
    watch = Watch(_store(fabric), fabric.global_rank, fabric.world_size, home_of(os.getpid()), timeout)
    assert distributed.group.WORLD is not None
    watch.follow(distributed.group.WORLD)
    done = threading.Event()
    watch.exchange()

    def exchange() -> None:
        while not done.wait(EVERY):
            with suppress(RuntimeError):  # the store is the first process's; without it all others are silent
                watch.exchange()

    def look() -> None:
        while not done.wait(EVERY):
            if reason := watch.look(stops=signals.taken() > 0):
                os.write(2, f"\nerror: {reason}\nSo this process ends too. {advice}\n".encode())
                done.wait(3.5 * EVERY)  # in which it is told, heard and looked at
                if end:
                    end()
                os._exit(ResourceError.status)

    # The store may block for minutes where a machine is gone.
    threads = [threading.Thread(target=work, daemon=True, name=work.__name__) for work in (exchange, look)]
    for thread in threads:
        thread.start()
    try:
        yield watch
    except BaseException:
        if watch.reason:
            threads[1].join()  # which ends this process; the others may be gone already, which is no news
        done.set()  # and nothing said: whoever waits for this process ends after a while
        raise
    done.set()
    threads[0].join(EVERY)
    with suppress(RuntimeError):
        watch.leave()


def _store(fabric: Fabric) -> Store:
    """A connection of its own to the store of the processes, under a name that no other run has."""
    name: str = fabric.broadcast(secrets.token_hex(8))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # Fabric sets them
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=EVERY))
    return PrefixStore(name, store)


def _seconds(looks: int) -> str:
    return f"{looks * EVERY:g}"
