"""The folder of a run: claimed for as long as the run lasts, with its settings and its log."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lit_qlora import cli
from lit_qlora.errors import ResourceError, UsageError, UserError
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.files.atomic import is_left_over, not_a_link, write_text
from lit_qlora.report import RunLog, tell
from lit_qlora.run import states
from lit_qlora.run.plan import Plan
from lit_qlora.run.resume import LOG, SAMPLES, SUMMARY, Checkpoint, before, read_log, write_log
from lit_qlora.run.trackers import Trackers
from lit_qlora.settings import FinetuneConfig, LogConfig, PreferenceRunConfig

BYTES_PER_PARAMETER = 16  # of a checkpoint: PEFT's copy, the parameter itself, two moments, all float32


def default_out_dir(config: FinetuneConfig) -> Path:
    """Return the default run folder of a run with these settings."""
    kind = "preference" if isinstance(config, PreferenceRunConfig) else "lora"
    return Path("out") / kind / config.checkpoint_dir.resolve().name


@contextmanager
def claim(config: FinetuneConfig, fabric: Fabric, checkpoint: Checkpoint | None, plan: Plan) -> Iterator[Path]:
    """Lock the run folder until the run ends, and write config.yaml into it.

    A run that resumes from `checkpoint` gets the log up to there. Any other run moves an earlier run in the same folder
    aside and never overwrites it.

    Raises:
        ResourceError: if the folder cannot be written, another run is using it, or the disk is too full.
        UsageError: if the earlier run holds something that this run needs.
    """
    assert config.out_dir is not None
    with ExitStack() as held:
        problem: UserError | None = None
        if fabric.is_global_zero:
            try:
                _take_folder(config, config.out_dir, checkpoint, plan, held)
            except UserError as error:
                problem = error
        problem = fabric.broadcast(problem)  # other processes would wait for the first one
        if problem:
            raise problem
        yield config.out_dir


def _take_folder(
    config: FinetuneConfig, out_dir: Path, checkpoint: Checkpoint | None, plan: Plan, held: ExitStack
) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(_lock(out_dir))
        _clean(out_dir)
        if not config.skip_disk_check:
            check_disk(out_dir, config.train.keep_last, plan.trainable)
        if (out_dir / LOG).exists() and not (checkpoint and checkpoint.path.parent.samefile(out_dir)):
            here = out_dir.resolve()  # if it is a link, its target moves
            resumed = checkpoint.path if checkpoint else None
            own = {"checkpoint_dir": config.checkpoint_dir, "lora.start": config.lora.start, "resume": resumed}
            _check_movable(out_dir, own)
            aside = next(p for n in range(1, 10_000) if not (p := here.with_name(f"{here.name}.{n}")).exists())
            here.rename(aside)
            tell(f"The earlier run in {out_dir} is now {aside}.")
            held.close()
            here.mkdir(exist_ok=True)  # another run may come first; then the error names its lock
            held.enter_context(_lock(out_dir))
        if checkpoint:
            # In this order, the log reaches the newest checkpoint whenever the program is killed here.
            (out_dir / SUMMARY).unlink(missing_ok=True)  # only a finished run has it
            for later in before(out_dir, checkpoint):  # the user resumes from an earlier one, or it is damaged
                _set_aside(later)
            for name in (LOG, SAMPLES):
                if (earlier := checkpoint.path.parent / name).exists():
                    write_log(out_dir / name, read_log(earlier, checkpoint.step))
            if losses := SampleLosses.read(checkpoint.path.parent):
                losses.up_to(checkpoint.step + 1).write(out_dir)
        write_text(out_dir / "config.yaml", cli.to_yaml(config))
    except OSError as error:
        raise ResourceError(f"out_dir {out_dir} cannot be written: {error.strerror or error}.") from None


def _check_movable(out_dir: Path, needed: Mapping[str, Path | None]) -> None:
    """Raise UsageError if the earlier run in out_dir holds the current directory or a path that this run needs."""
    for name, path in {"the current directory": Path.cwd(), **needed}.items():
        if path and path.resolve().is_relative_to(out_dir.resolve()):
            raise UsageError(
                f"out_dir {out_dir} holds an earlier run, which would be moved aside with {name} {path}.\n"
                "Take another --out_dir."
            )


def check_disk(out_dir: Path, keep_last: int, trainable: int) -> None:
    """Raise ResourceError unless the disk has room for the last checkpoints, the best, the final, and a new one."""
    needed = (keep_last + 3) * (BYTES_PER_PARAMETER * trainable + 2**20)
    free = shutil.disk_usage(out_dir).free
    if needed > free:
        raise ResourceError(
            f"out_dir {out_dir}: the checkpoints need up to {needed / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB are free.\n"
            "Take another --out_dir or a smaller --train.keep_last; --skip_disk_check starts anyway."
        )


def _clean(out_dir: Path) -> None:
    """Remove temporary files of killed programs, and states whose adapters they did not save."""
    for left in out_dir.glob("*.tmp-*"):
        if is_left_over(left):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    states.remove_alone(out_dir)


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint, and its state; a kill in between leaves a state that is found by its hash."""
    aside = states.free_name(folder)
    folder.rename(aside)
    if states.beside(folder).is_dir():
        states.beside(folder).rename(states.beside(aside))
    tell(f"{folder} is newer than what the run resumes from, and is now {aside}. It may go if nobody wants it.")


def _lock(out_dir: Path) -> Any:
    handle = open(out_dir / ".lock", "a+", opener=not_a_link)  # noqa: SIM115 - open until the run ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with handle:
            handle.seek(0)
            owner = handle.read().strip()
        raise ResourceError(
            f"out_dir {out_dir} is in use by the run with process id {owner}.\nWait for it, or take another --out_dir."
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


@contextmanager
def open_log(
    config: LogConfig, settings: Mapping[str, Any], out_dir: Path, total: int, fabric: Fabric
) -> Iterator[RunLog]:
    """Open the run's log, silent in all processes but the first; closing it gives an error message its own line.

    Args:
        settings: those of the run by their full names, for the trackers.
    """
    first = fabric.is_global_zero
    with open(os.devnull, "w") as nobody:
        log = RunLog(out_dir / LOG if first else None, total, None if first else nobody)
        names = config.to if first else ()
        assert isinstance(names, tuple)
        trackers = Trackers(names, out_dir, settings, log.start)
        log.trackers.append(trackers)
        log.records = fabric.broadcast(log.records)
        try:
            yield log
        finally:
            log.close()
            trackers.close()
