"""Processes of a run watch each other, so that none waits for ever.

A collective waits until all processes take part. Gloo notices that one of them died, but NCCL does not. Neither
notices that one makes fewer gathers than the others. Up to the timeout of their group, half an hour, nothing is said.

So each process tells the others by the group's store, every few seconds, that it lives. A process ends with a message
once another one on its machine is gone, or was silent for 100 seconds. It also ends once a gather of its own did not
come about for 120. A slow process lives, and nobody begins a gather before all have begun the same pass. So
validations, checkpoints and answers of the first process may take their time. Only the work between two gathers of a
pass may not.

A graceful stop waits for the end of a step, which does not come where another process is gone. torchrun, which sends
SIGTERM then, kills after 30 seconds; so a process that is to stop takes a shorter silence for an end.

Time is counted in looks. So a machine that slept, or a process that was stopped and continued, raises no alarm.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread

from lightning.fabric import Fabric
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from lit_qlora import signals
from lit_qlora.errors import ResourceError
from lit_qlora.model.gpt import Gathers

EVERY = 5.0
"""Seconds between two looks."""
SILENT = 20
"""Looks after which a process that said nothing is taken for dead. A compiler may hold Python for as long."""
HURRIED = 4
"""The same in a process that is to stop."""
GONE = 2
"""Looks after the first one at which a process on this machine was gone; one that is done says so meanwhile."""
STUCK = 24
"""Looks after which a gather is taken for one that never comes about. Kernels of a first pass compile meanwhile."""
DONE = "done"
"""Said by a process that needs the others no more."""
_REASON = "reason"
_HOME = "home-"


class Watch:
    """The look of a process at the others.

    Args:
        store: which all processes share.
        home: of this process, see home_of; "" for none.

    Attributes:
        gathers: of the base, once it is there and if it is sharded.
        reason: for all processes to end; "" for none.
    """

    def __init__(self, store: Store, rank: int, processes: int, home: str = "") -> None:
        self.store, self.rank, self.home = store, rank, home
        self.gathers: Gathers | None = None
        self._beats, self.reason = 0, ""
        self._heard = {other: "" for other in range(processes) if other != rank}
        self._homes = dict.fromkeys(self._heard, "")
        self._unchanged = {other: _Unchanged() for other in range(processes)}
        self._gone = {other: _Unchanged() for other in self._heard}

    def exchange(self) -> None:
        """Tell the others that this process lives, and why it ends, and hear the same of them."""
        self._beats += 1
        self.store.set(f"{_HOME}{self.rank}", self.home)
        self.store.set(str(self.rank), f"{self._beats} {self._begun}")
        if self.reason:
            self.store.set(_REASON, self.reason)
        for other in self._heard:
            self._heard[other] = self._said(str(other))
            self._homes[other] = self._homes[other] or self._said(f"{_HOME}{other}")
        self.reason = self.reason or self._said(_REASON)

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
        waits = None if self.gathers is None else self.gathers.unfinished()
        if self._unchanged[self.rank].looks(waits) < STUCK or waits is None:
            return ""
        begun = {other: said.split()[-1] for other, said in self._heard.items() if said not in ("", DONE)}
        others = ", ".join(f"process {other} has begun {count}" for other, count in begun.items())
        return (
            f"Process {self.rank} has waited for {_seconds(STUCK)} s for gather {waits} of the base's weights, "
            f"which the others do not take part in: {others}."
        )

    @property
    def _begun(self) -> int:
        return 0 if self.gathers is None else self.gathers.gathers

    def _said(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


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
    *where, pid, start = home.split() or ("", "")
    if not home or where != own.split()[:-2]:
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


@contextmanager
def watched(fabric: Fabric, advice: str) -> Iterator[Watch]:
    """Let the processes of a run watch each other inside; all end at once where one of them would wait for ever.

    Args:
        advice: ends the message.
    """
    if fabric.world_size == 1:
        yield Watch(HashStore(), 0, 1)
        return
    watch = Watch(_store(fabric), fabric.global_rank, fabric.world_size, home_of(os.getpid()))
    done = Event()
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
                os._exit(ResourceError.status)

    # The store may block for minutes where a machine is gone.
    threads = [Thread(target=work, daemon=True, name=work.__name__) for work in (exchange, look)]
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
