"""A run around its loop: the folder it owns, the checkpoints in it, what it leaves behind."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor

from lit_qlora import cli
from lit_qlora.data import RunData, count_steps, longest_step, steps
from lit_qlora.errors import NumericalError, ResourceError, UsageError, UserError
from lit_qlora.evaluate.measures import Ask, Losses, Measure, more_measures, tasks_measure
from lit_qlora.evaluate.validation import Validator
from lit_qlora.evaluate.validation_inputs import Probes
from lit_qlora.files.atomic import is_left_over
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record, RunLog, tell
from lit_qlora.run.banner import savings
from lit_qlora.run.plan import Plan, check_fp8
from lit_qlora.run.reports import one_line
from lit_qlora.run.resume import (
    LOG,
    SAMPLES,
    SUMMARY,
    Checkpoint,
    before,
    checkpoints,
    flat,
    plain,
    read_log,
    write_log,
)
from lit_qlora.run.saver import Saver
from lit_qlora.run.trackers import Mirrors
from lit_qlora.settings import FinetuneConfig
from lit_qlora.train.guards import Guard
from lit_qlora.train.loop import BadStepError, train
from lit_qlora.train.optim import check_schedule, make_optimizer, repage
from lit_qlora.train.signals import Stopped, StopRequest, stop_on_signals
from lit_qlora.train.training_state import restore

SHOWN = 3  # answers that are shown at each validation
BYTES_PER_PARAMETER = 16  # of a checkpoint: PEFT's copy, the parameter itself, two moments, all float32


def default_out_dir(checkpoint_dir: Path) -> Path:
    """Where a run on this checkpoint goes when nobody says."""
    return Path("out/lora") / checkpoint_dir.resolve().name


def total_steps(config: FinetuneConfig, data: RunData) -> int:
    """Optimizer steps of the run.

    Raises:
        UsageError: if the schedule does not fit into them.
    """
    train = config.train
    total = count_steps(len(data.train), data.batching, train.epochs, train.max_steps)
    check_schedule(train, total)
    return total


def eval_every(config: FinetuneConfig, data: RunData, total: int) -> int:
    """Optimizer steps between validations."""
    every = config.eval.every
    if 0 < every < 1:
        every *= count_steps(len(data.train), data.batching, epochs=1)
    return max(1, round(every or total / 10))


def take_path(model: GPT, plan: Plan) -> None:
    """Let the model compute its loss as the plan says; call it before the optimizer is made.

    Raises:
        UsageError: if that is in FP8, and the model as it was loaded cannot.
    """
    if plan.slow_because:
        model.recompute = plan.recompute[0] == "full"
        return
    from lit_qlora.fused import fuse, why_not

    if reason := why_not(model):  # only the loaded model shows it
        check_fp8(plan.fp8, reason)
        tell(f"  path    plain after all ({reason})")
        model.recompute = plan.recompute[0] != "none"
        return
    fused = fuse(model, plan.graph_tokens, plan.fp8, plan.kept_blocks)
    fused.set_recompute(plan.recompute)
    fused.stay = plan.stay
    if fused.graphs and not plan.graphs:
        fused.graphs.off = "there is no memory left for them"


def set_deterministic() -> None:
    """Let torch take only operations that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


@contextmanager
def claim(config: FinetuneConfig, fabric: Fabric, checkpoint: Checkpoint | None, plan: Plan) -> Iterator[Path]:
    """The run's folder, held until the run ends, with config.yaml in it.

    A run that goes on from `checkpoint` finds its log up to there. Otherwise an earlier run in the same place is moved
    aside, never overwritten.

    Raises:
        ResourceError: if the folder cannot be written, another run is using it, or the disk is too full.
        UsageError: if what would be moved aside is still needed.
    """
    assert config.out_dir is not None
    with ExitStack() as held:
        problem: UserError | None = None
        if fabric.is_global_zero:
            try:
                _take_folder(config, config.out_dir, checkpoint, plan, held)
            except UserError as error:
                problem = error
        problem = fabric.broadcast(problem)  # the others would wait for the first
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
        if (out_dir / LOG).exists() and not (checkpoint and checkpoint.path.parent.samefile(out_dir)):
            here = out_dir.resolve()  # of a link, the folder behind it moves
            _check_movable(config, here, checkpoint)
            aside = next(p for n in range(1, 10_000) if not (p := here.with_name(f"{here.name}.{n}")).exists())
            here.rename(aside)
            tell(f"The earlier run in {out_dir} is now {aside}.")
            held.close()
            here.mkdir(exist_ok=True)  # another run may be as quick; then its lock is what is said
            held.enter_context(_lock(out_dir))
        if not config.skip_disk_check:
            check_disk(config, plan)
        if checkpoint:
            # In this order, for whenever the program is killed here, the log reaches up to the newest checkpoint.
            (out_dir / SUMMARY).unlink(missing_ok=True)  # which a run has when it is over
            for later in before(out_dir, checkpoint):  # the user goes on from an earlier one, or it is damaged
                _set_aside(later)
            for name in (LOG, SAMPLES):
                if (earlier := checkpoint.path.parent / name).exists():
                    write_log(out_dir / name, read_log(earlier, checkpoint.step))
        (out_dir / "config.yaml").write_text(cli.to_yaml(config))
    except OSError as error:
        raise ResourceError(f"out_dir {out_dir} cannot be written: {error.strerror or error}.") from None


def _check_movable(config: FinetuneConfig, here: Path, checkpoint: Checkpoint | None) -> None:
    """Raise UsageError if the earlier run in the folder `here` would take along what this one needs."""
    needed = {
        "the current directory": Path.cwd(),
        "checkpoint_dir": config.checkpoint_dir,
        "lora.start": config.lora.start,
        "resume": checkpoint and checkpoint.path,
    }
    for name, path in needed.items():
        if path and path.resolve().is_relative_to(here):
            raise UsageError(
                f"out_dir {config.out_dir} holds an earlier run, which would be moved aside with {name} {path} in it.\n"
                "Take another --out_dir."
            )


def check_disk(config: FinetuneConfig, plan: Plan) -> None:
    """Raise ResourceError unless the disk has room for the checkpoints: the last ones, the best, the final, and one."""
    assert config.out_dir is not None
    needed = (config.train.keep_last + 3) * (BYTES_PER_PARAMETER * plan.trainable + 2**20)
    free = shutil.disk_usage(config.out_dir).free
    if needed > free:
        raise ResourceError(
            f"out_dir {config.out_dir}: the checkpoints need up to {needed / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB are free.\n"
            "Take another --out_dir or a smaller --train.keep_last; --skip_disk_check begins regardless."
        )


def _clean(out_dir: Path) -> None:
    """Remove what programs that were killed left half done."""
    for left in out_dir.glob("*.tmp-*"):
        if is_left_over(left):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _set_aside(folder: Path) -> None:
    aside = next(p for n in range(1, 10_000) if not (p := folder.with_name(f"aside-{folder.name}.{n}")).exists())
    folder.rename(aside)


def _lock(out_dir: Path) -> Any:
    handle = open(out_dir / ".lock", "a+")  # noqa: SIM115 - held until the run ends
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
def open_log(config: FinetuneConfig, out_dir: Path, total: int, fabric: Fabric) -> Iterator[RunLog]:
    """The run's log, closed whatever happens, so that an error message gets a line of its own; mute on other ranks."""
    first = fabric.is_global_zero
    with open(os.devnull, "w") as nobody:
        log = RunLog(out_dir / LOG if first else None, total, None if first else nobody)
        names = config.log.to if first else ()
        assert isinstance(names, tuple)
        mirrors = Mirrors(names, out_dir, flat(plain(config)), log.start)
        log.mirrors.append(mirrors)
        log.records = fabric.broadcast(log.records)
        try:
            yield log
        finally:
            log.close()
            mirrors.close()


def set_up(fabric: Fabric, model: GPT, config: FinetuneConfig) -> tuple[_FabricModule, torch.optim.Optimizer]:
    """The model and its optimizer as train takes them."""
    scaled = config.precision == "16-mixed"
    optimizer = make_optimizer(model.named_parameters(), config.optimizer, config.train, scaled=scaled)
    fabric_model, optimizer = fabric.setup(model, optimizer)
    fabric_model.mark_forward_method("loss")
    return fabric_model, optimizer


def learn(
    fabric: Fabric,
    model: GPT,
    config: FinetuneConfig,
    data: RunData,
    total: int,
    log: RunLog,
    checkpoint: Checkpoint | None,
    probes: Probes,
    ask: Ask | None = None,
) -> Tensor | None:
    """Train the adapters of `model`, from `checkpoint` on if there is one.

    Args:
        ask: asks the model the tasks of lm-eval.

    Returns:
        What measures.score_rows says of the validation samples at the last validation, if there was one.
    """
    fabric_model, optimizer = set_up(fabric, model, config)
    start, last = 0, None
    if checkpoint:
        restore(fabric, model, optimizer, checkpoint.path)
        repage(optimizer)
        start = checkpoint.step
        assert config.out_dir is not None
        if checkpoint.path.parent.samefile(config.out_dir):
            last = (start, config.out_dir / checkpoint.path.name)
    guard = Guard(config.guard, scaled=config.precision == "16-mixed")
    for record in log.records:
        if "loss" in record:
            guard.recall(record["loss"], record.get("skipped", False))
    with stop_on_signals() as stop, explained(config, data):
        alone = stop if fabric.world_size == 1 else StopRequest()  # other ranks would wait for what is cut short
        saver = Saver(config, fabric, model, optimizer, data, total, log, last)
        losses = Losses(fabric, model, data.val_batches, alone)
        tasks = tasks_measure(ask, model, config.eval.tasks_every, total, log.records) if ask else None
        more = more_measures(fabric, model, config, data, probes, partial(keep_answers, saver.out_dir, log), tasks)
        measures: list[Measure] = [losses, *more] if data.val_batches else more
        validator = Validator(config.eval, eval_every(config, data, total), total, measures, log, saver.keep, alone)
        go_on = validator.catch_up(log.records, start)
        if stop.signal and fabric.world_size == 1:
            raise Stopped(stop.signal, start)
        if not go_on or start == total:
            saver(start, True)
            tell_early_end(validator, log, total)
            return losses.scores
        train(
            fabric,
            fabric_model,
            optimizer,
            steps(data.train, data.batching, total, fabric.global_rank, fabric.world_size, start),
            total,
            config.train,
            log=log,
            save=saver,
            validate=validator,
            guard=guard,
            stop=stop,
            seed=config.seed,
            start=start,
            seconds=log.seconds,
            probe=longest_step(data.train, data.batching, fabric.world_size) if fabric.device.type == "cuda" else None,
        )
        tell_early_end(validator, log, total)
    return losses.scores


def tell_early_end(validator: Validator, log: RunLog, total: int) -> None:
    """Say why a run of `total` steps ended before them, if it did."""
    if not validator.go_on and validator.best and log.records[-1]["step"] < total:
        log.say(
            f"  note    ended early: {validator.config.best} got no better after step {validator.best[1]}; "
            "--extend with a larger --eval.patience goes on"
        )


def keep_answers(out_dir: Path, log: RunLog, step: int, records: list[Record]) -> None:
    """Put the answers of a validation into OUT/samples.jsonl, where each step stands once, and show a few."""
    write_log(out_dir / SAMPLES, [*read_log(out_dir / SAMPLES, step - 1), *records])
    free = [record for record in records if "wanted" not in record]
    for record in (free or records)[:SHOWN]:
        log.say(f"  says    {one_line(record['prompt'], 60)} -> {one_line(record['answer'], 100)}")


@contextmanager
def explained(config: FinetuneConfig, data: RunData) -> Iterator[None]:
    """Let whoever reads the error know what to look at, or what to change."""
    assert config.out_dir is not None
    try:
        yield
    except BadStepError as error:
        step = error.step
        path = config.out_dir / "bad_batch.json"
        rows = [
            {"tokens": tokens, "labels": labels, "text": data.tokenizer.decode(tokens)}
            for batch in step.batches
            for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        ]
        facts = {"error": str(error), "epoch": step.epoch, "samples": list(step.numbers), "rows": rows}
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        saved = checkpoints(config.out_dir)
        good = f"the newest checkpoint is {saved[0]}" if saved else "no checkpoint was due before it"
        raise NumericalError(f"{error}\nIts samples are in {path}; {good}.") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise ResourceError(f"Out of memory. {reason}\n{savings(config, data)}") from None
    except RuntimeError as error:
        if not _is_about_another_process(error):
            raise
        raise ResourceError(
            "another process of this run has ended, so this one ends too.\n"
            f"{config.out_dir} holds the checkpoints: the same command goes on from the newest."
        ) from None


def _is_about_another_process(error: RuntimeError) -> bool:
    """Whether a process that this one works with has gone; gloo has no exception of its own."""
    distributed = getattr(torch.distributed, "DistError", ())
    return isinstance(error, distributed) or "gloo" in str(error)
