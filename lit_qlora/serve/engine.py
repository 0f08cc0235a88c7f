"""The one thread that uses the model: takes jobs from a queue, keeps the batch running, tells each job its text."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lit_qlora.errors import NumericalError
from lit_qlora.generation.batching import Batcher, Request
from lit_qlora.generation.text import TextStream
from lit_qlora.inference import Roster

T = TypeVar("T")
READ_AT_ONCE = 2048
"""Tokens, padding included, of the prompts that are read together; a longer prompt is read alone."""


class QueueFullError(Exception):
    """As many jobs wait as may wait."""


@dataclass(eq=False)
class Job:
    """A request, the text that comes of it, and who is told.

    Attributes:
        tell: called in the engine's thread with a piece of text and, with the last one, why it is the last: 'stop',
            'length', 'timeout' or 'error'.
        deadline: the time.monotonic() at which it is given up.
    """

    request: Request
    text: TextStream
    tell: Callable[[str, str | None], None]
    deadline: float
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Answers jobs in the order in which they come, several at a time.

    Args:
        slots: jobs that are answered at a time.
        queue: jobs that may wait.
        context: most tokens of a prompt and its answer.
    """

    def __init__(self, roster: Roster, slots: int, queue: int, context: int) -> None:
        self.queue = queue
        self._batcher = Batcher(roster.model, slots, roster.switch.select, roster.tokenizer.size, context)
        self._running: dict[Request, Job] = {}
        self._waiting: deque[Job] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Give up all jobs and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """True if its thread runs."""
        return self._thread.is_alive()

    @property
    def has_room(self) -> bool:
        """True if another job may wait."""
        return len(self._waiting) + len(self._running) < self.queue + self._batcher.slots

    @property
    def load(self) -> tuple[int, int]:
        """Number of jobs that are being answered, and that wait."""
        return len(self._running), len(self._waiting)

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait for their turn: all of them or none.

        Raises:
            QueueFullError: if there is no room for all of them to wait.
        """
        with self._changed:
            free = self._batcher.slots - len(self._running)
            if len(self._waiting) + len(jobs) > self.queue + free:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def run(self, task: Callable[[], T]) -> "Future[T]":
        """Have the engine's thread run something else that uses the model, between two steps of the batch.

        Raises:
            QueueFullError: if there is no room for it to wait.
        """
        future: Future[T] = Future()
        with self._changed:
            if len(self._tasks) >= max(1, self.queue):
                raise QueueFullError
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._tasks or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self._run_a_task()
                self._give_up()
                self._admit()
                self._step()
            except Exception:  # a defect, or memory that ran out, ends what is being answered, and not the server
                traceback.print_exc()
                self._fail_all()
        for job in [*self._running.values(), *self._waiting]:
            job.tell("", "error")
        for _, future in self._tasks:
            future.cancel()

    def _run_a_task(self) -> None:
        with self._changed:
            task, future = self._tasks.popleft() if self._tasks else (None, None)
        if task is None or future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)

    def _give_up(self) -> None:
        """End jobs whose client has gone or whose deadline has passed, and free their slots."""
        now = time.monotonic()
        for job in list(self._running.values()):
            if job.cancelled.is_set() or now > job.deadline:
                self._batcher.leave(job.request)
                self._end(job, "timeout")
        with self._changed:
            over = [job for job in self._waiting if job.cancelled.is_set() or now > job.deadline]
            self._waiting = deque(job for job in self._waiting if job not in over)
        for job in over:
            job.tell("", "timeout")

    def _admit(self) -> None:
        """Let jobs join whose prompts are read at once; running jobs wait for one such reading at most."""
        jobs: list[Job] = []
        with self._changed:
            while self._waiting and len(self._running) < self._batcher.slots:
                longest = max(len(job.request.prompt) for job in (*jobs, self._waiting[0]))
                if jobs and longest * (len(jobs) + 1) > READ_AT_ONCE:
                    break
                jobs.append(self._waiting.popleft())
                self._running[jobs[-1].request] = jobs[-1]
        if jobs and not self._join(jobs):
            for job in jobs:  # one of them may be to blame alone
                if len(jobs) == 1 or not self._join([job]):
                    self._end(job, "error")

    def _join(self, jobs: list[Job]) -> bool:
        """Let jobs join the batch; False if they cannot. The batch then is as it was, and its other jobs go on."""
        try:
            self._batcher.join(*(job.request for job in jobs))
        except (NumericalError, RuntimeError):
            return False
        return True

    def _step(self) -> None:
        if not self._running:
            return
        for request in self._batcher.step():
            job, reason = self._running[request], request.finish_reason
            piece = "" if reason in ("stop", "error") else job.text.push(request.answer[-1])
            if job.text.stopped:
                if reason is None:
                    self._batcher.leave(request)
                reason = "stop"
            if reason:
                self._end(job, reason, piece + job.text.end())
            elif piece:
                job.tell(piece, None)
        self._batcher.look_ahead()

    def _fail_all(self) -> None:
        """Give up all that are being answered."""
        for request in list(self._batcher.active):
            self._batcher.leave(request)
        for job in list(self._running.values()):
            self._end(job, "error")

    def _end(self, job: Job, reason: str, piece: str = "") -> None:
        with self._changed:
            del self._running[job.request]
        job.tell(piece, reason)
