"""Starts the other processes of a machine where nothing else does, and tells why a run ends if one of them fails.

Lightning's launcher kills all processes without a word once one of them has failed, the first one too. The reason is
somewhere above, if the process had time to say it, between what the others say.

Here the first process speaks for all of its machine. The messages of the others go to files without a name. Where one
of them fails, the first process ends the run, and shows the messages of that one last.
"""

import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from signal import SIGKILL, Signals
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _SubprocessScriptLauncher

from lit_qlora.errors import ResourceError, UserError

GRACE = 5.0
"""Seconds that the first process has to end by itself, once another one has failed: often all find the same error."""
LEAVING = 20.0
"""Seconds that a process may take to leave its libraries behind, after its connections are gone."""
LOST = "Another process of this run has ended, so this one ends too."
WORDS = 4000
"""Bytes that are shown of the messages of a process that failed."""


class LostProcessError(ResourceError):
    """Another process of the run has ended, so this one ends too.

    Args:
        advice: for the user.
    """

    def __init__(self, advice: str) -> None:
        super().__init__(f"{LOST}\n{advice}")


def is_about_another_process(error: BaseException) -> bool:
    """Tell whether an error means that another process is gone; gloo has no exception of its own."""
    distributed: Any = getattr(torch.distributed, "DistError", ())
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo or isinstance(error, (LostProcessError, distributed))


class FailedProcessError(UserError):
    """Another process of this machine has failed."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Child:
    """Another process of this machine, which the first one started.

    Args:
        rank: its number in the run.
    """

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.rank = rank
        self._messages, path = tempfile.mkstemp()
        os.unlink(path)
        weakref.finalize(self, os.close, self._messages)
        self.process = subprocess.Popen(command, env=environment, stderr=self._messages)

    def messages(self) -> str:
        """The end of its messages, in whole lines."""
        size = os.fstat(self._messages).st_size
        end = os.pread(self._messages, WORDS, max(0, size - WORDS))  # which leaves the place where the process writes
        text = end.decode(errors="replace")
        return (text if size <= WORDS else text.partition("\n")[2]).strip()

    def error(self) -> FailedProcessError:
        """The error that its end is to the run."""
        status, said = self.process.wait(), self.messages()
        how = f"was ended by {Signals(-status).name}" if status < 0 else f"ended with status {status}"
        how += ", as by Linux where memory runs out" if status == -SIGKILL else ""
        how += ", before the others were done" if status == 0 else ""
        message = f"Process {self.rank} of this run {how}, so all of it ends."
        message += f" Its last messages:\n{said}" if said else ""
        return FailedProcessError(message, status if status > 0 else ResourceError.status)


class Children:
    """All other processes of this machine, as the first one sees them.

    Attributes:
        over: the first process ends, so no end of another one matters.
    """

    def __init__(self) -> None:
        self.every: list[Child] = []
        self.over, self._failed = threading.Event(), threading.Event()
        self._speaks = threading.Lock()

    def start(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process, and end all with its error if it fails and this process does not end by itself."""
        child = Child(rank, command, environment)
        self.every.append(child)
        threading.Thread(target=self._attend, args=(child,), daemon=True, name=f"process {rank}").start()

    def _attend(self, child: Child) -> None:
        if child.process.wait() == 0:
            return
        self._failed.set()
        if self.over.wait(GRACE) or not self._speaks.acquire(blocking=False):
            return
        error = self.failure() or child.error()
        self.end()
        with suppress(OSError, ValueError):  # the reader may be gone
            print(f"\n{error.prefix}{error}", file=sys.stderr, flush=True)
        os._exit(error.status)

    def failure(self, within: float = 0.0) -> FailedProcessError | None:
        """The error of the process that failed, if one did; not of one that ended because of it, if that can be told.

        Args:
            within: seconds to wait for it.
        """
        self._failed.wait(within)
        errors = [child.error() for child in self.every if child.process.poll()]
        return min(errors, key=lambda error: LOST in str(error), default=None)

    def early(self) -> FailedProcessError | None:
        """The error of a process that ended well, but is missed."""
        return next((child.error() for child in self.every if child.process.poll() == 0), None)

    def end(self) -> None:
        """End them at once: they may wait for this process, or tell what it tells."""
        for child in self.every:
            child.process.kill()

    @contextmanager
    def led(self) -> Iterator[None]:
        """Speak for them inside. Where an error ends this process, they end before it is told."""
        try:
            yield
        except BaseException as error:
            misses = self.every and is_about_another_process(error)
            failure = self.failure(LEAVING) or self.early() if misses else None
            self.over.set()
            self.end()
            if failure:
                raise failure from None
            raise
        self.over.set()


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher with other children; its own observer has none to look at.

    Args:
        children: gets the processes.
    """

    def __init__(self, children: Children, *given: object) -> None:
        super().__init__(*given)
        self.children = children

    def _call_children_scripts(self) -> None:
        """Start the other processes of this machine as Lightning does, with the same variables."""
        self._check_can_spawn_children()
        cluster, here = self.cluster_environment, self.num_processes
        os.environ |= {
            "MASTER_ADDR": cluster.main_address,
            "MASTER_PORT": str(cluster.main_port),
            "NODE_RANK": str(cluster.node_rank()),
            "LOCAL_RANK": str(cluster.local_rank()),
            "WORLD_SIZE": str(here * self.num_nodes),
        }
        for rank in range(1, here):
            environment = os.environ | {"LOCAL_RANK": str(rank)}
            self.children.start(cluster.node_rank() * here + rank, _basic_subprocess_cmd(), environment)
