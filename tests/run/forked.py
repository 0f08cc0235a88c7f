"""finetune/lora.py, or another command, in processes forked from this one, so that a hundred of them cost seconds."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

import torch

from lit_qlora import cli
from lit_qlora.lora.adapter import PEFT_WEIGHTS
from lit_qlora.quantize import bitsandbytes
from lit_qlora.run import learning, saver, summary  # noqa: F401 - learning is what takes long to import
from lit_qlora.settings import FinetuneConfig
from tests.conftest import load_script

EXACT = ("step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens", "samples", "val_loss", "skipped")
STEPS = 8
# What each run would take the time for again, this process does once:
cli.parse(FinetuneConfig, ["--data.path=x"])  # whose parser is kept
if not torch.cuda.is_available():  # or bitsandbytes would begin what no process can inherit
    bitsandbytes()


class Child:
    """A run in a process of its own.

    Args:
        said: gets what it prints.
        before: is called in the process, before the run; what it patches, nobody else sees.
        script: the command.
    """

    def __init__(
        self,
        flags: Sequence[str],
        said: Path,
        before: Callable[[], object] | None = None,
        script: str = "finetune/lora.py",
    ) -> None:
        self.said = said
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            summary.write_pages = lambda *given: None  # half of the time of such a short run
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)  # a worker of pytest-xdist has its own
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
            if before:
                before()
            main = load_script(script).main
            cli.run(main, get_type_hints(main)["config"], list(flags))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status; that of a killed process is negative."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def running(self) -> bool:
        """Whether it has not ended yet; it is to be waited for all the same."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for(self, path: Path) -> None:
        """Return as soon as `path` exists."""
        end = time.monotonic() + 60
        while not path.exists():
            assert self.running(), self.said.read_text()
            assert time.monotonic() < end, f"{path} did not come"
            time.sleep(0.002)


def at_save(step: int, what: Callable[[], object]) -> Callable[[], None]:
    """For `before`: do something as soon as the checkpoint after `step` steps is saved."""

    def patch() -> None:
        save = saver.Saver.__call__

        def hooked(self: saver.Saver, now: int, over: bool) -> None:
            save(self, now, over)
            if now == step:
                what()

        saver.Saver.__call__ = hooked  # type: ignore[method-assign]

    return patch


def signals(number: int) -> Callable[[], None]:
    """Send a signal to oneself."""
    return lambda: os.kill(os.getpid(), number)


def ending(out: Path) -> tuple[list[dict], bytes]:
    """What must be equal: the log without its times, and the adapter."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{key: record[key] for key in EXACT if key in record} for record in records]
    return kept, (out / "final" / PEFT_WEIGHTS).read_bytes()


Start = Callable[..., Child]
"""The fixture that begins a run: start(out_dir, *flags, before=...)."""
