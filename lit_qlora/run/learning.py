"""The learning of a run: its path, its optimizer, and the loop with its validations and checkpoints."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.data import RunData, count_steps, longest_step, steps
from lit_qlora.data.batches import steps_of_an_epoch
from lit_qlora.device import lay_end_to_end, precede_other_streams, scales_loss
from lit_qlora.errors import NumericalError, ResourceError
from lit_qlora.evaluate.measures import Dispensable, Measure, more_measures, tasks_measure
from lit_qlora.evaluate.validation import Validator
from lit_qlora.evaluate.validation_inputs import Probes, frames
from lit_qlora.files.atomic import write_text
from lit_qlora.model.gpt import GPT
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.report import Record, RunLog, tell
from lit_qlora.run.banner import savings
from lit_qlora.run.lessons import FILE_NAME as LESSONS
from lit_qlora.run.lessons import seen_measure, watch_list
from lit_qlora.run.losses import losses_of
from lit_qlora.run.plan import Plan, check_fp8
from lit_qlora.run.preferences import falling
from lit_qlora.run.reports import Frame, one_line, unframed
from lit_qlora.run.resume import SAMPLES, Checkpoint, checkpoints, read_log, write_log
from lit_qlora.run.resume import advice as resume_advice
from lit_qlora.run.saver import Contents, Saver
from lit_qlora.settings import EvalConfig, FinetuneConfig, OptimizerConfig, PreferenceRunConfig, TrainConfig
from lit_qlora.signals import caught
from lit_qlora.train.distillation import Distillation
from lit_qlora.train.guards import Guard
from lit_qlora.train.launcher import LostProcessError, is_about_another_process
from lit_qlora.train.loop import BadStepError, Learner, Paused, Stopped, agree, follow, share_of_steps, train
from lit_qlora.train.objective import CrossEntropy, Objective
from lit_qlora.train.optim import check_schedule, make_optimizer, repage
from lit_qlora.train.preferences import Preferences
from lit_qlora.train.routers import RouterLosses
from lit_qlora.train.scoring import LabelLoss
from lit_qlora.train.training_state import restore

SHOWN = 3  # answers shown at each validation


def total_steps(config: TrainConfig, data: RunData) -> int:
    """Count the optimizer steps of the run.

    Raises:
        UsageError: if the schedule does not fit into them.
    """
    total = count_steps(len(data.train), data.batching, config.epochs, config.max_steps)
    check_schedule(config, total)
    return total


def settle_warmup(train: TrainConfig, data: RunData) -> TrainConfig:
    """Turn train.warmup_epochs into the number of steps that it is for this data."""
    if train.warmup_epochs is None:
        return train
    steps = round(train.warmup_epochs * steps_of_an_epoch(len(data.train), data.batching))
    return replace(train, warmup=float(steps), warmup_epochs=None)


def eval_every(config: EvalConfig, data: RunData, total: int) -> int:
    """Work out the optimizer steps between validations from eval.every or eval.epochs."""
    every = config.epochs or config.every
    if config.epochs or 0 < every < 1:
        every *= steps_of_an_epoch(len(data.train), data.batching)
    return max(1, round(every or total / 10))


def agree_on(plan: Plan) -> Plan:
    """Take the plan of the process with least room: recomputed blocks are exchanged again, in all that share a row."""
    if plan.parts == 1:
        return plan
    plans: list[Plan | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(plans, plan)
    return min(filter(None, plans), key=lambda one: (one.activations, one.host))


def take_path(model: GPT, plan: Plan) -> None:
    """Put the model on the path of the plan; call it before the optimizer is made.

    Raises:
        UsageError: if the plan has FP8, and the loaded model does not support it.
    """
    if plan.slow_because:
        model.recompute = plan.recompute[0] == "full"
    else:
        _take_fast_path(model, plan)
    if model.gathers is None:
        lay_end_to_end(t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)


def _take_fast_path(model: GPT, plan: Plan) -> None:
    from lit_qlora.fused import fuse, why_not

    if reason := why_not(model, plan.dtype):  # known only for the loaded model
        check_fp8(plan.fp8, reason)
        tell(f"  path    plain after all ({reason})")
        model.recompute = plan.recompute[0] != "none" or model.gathers is not None
        return
    for parameter in model.parameters():
        if plan.dtype and not parameter.requires_grad:
            parameter.data = parameter.data.to(plan.dtype)
    fused = fuse(model, plan.graph_tokens, plan.fp8, plan.cached_blocks, plan.ahead, plan.copies_at_once)
    if fused.ahead and fused.device.type == "cuda":
        precede_other_streams()
    fused.set_recompute(plan.recompute)
    fused.carries = plan.carries
    if fused.graphs and not plan.graphs:
        fused.graphs.off = "there is no memory left for them"


def set_deterministic() -> None:
    """Let torch use only deterministic operations."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)


def make_objective(fabric: Fabric, config: FinetuneConfig, scoring: Scoring | None = None) -> Objective:
    """The loss of a micro-batch that the settings describe; with a head for this task."""
    if isinstance(config, PreferenceRunConfig):
        return Preferences(config.preference, fabric.device)
    if config.teacher_dir:
        return Distillation(config.distill, fabric.device)
    return LabelLoss(scoring, fabric.device) if scoring else CrossEntropy()


def make_learner(
    fabric: Fabric,
    model: GPT,
    config: OptimizerConfig,
    train: TrainConfig,
    scaled: bool,
    objective: Objective | None = None,
) -> Learner:
    """Give the model its optimizer, for training on the path it takes; the loss is `scaled` in float16."""
    flatten = None if model.fast is None else model.fast.flatten
    optimizer = make_optimizer(model.named_parameters(), config, train, scaled=scaled, flatten=flatten)
    factors = (train.router_balance_loss, train.router_z_loss)
    return Learner(fabric, model, optimizer, RouterLosses(model, *factors) if any(factors) else None, objective)


def learn(
    fabric: Fabric,
    model: GPT,
    config: FinetuneConfig,
    data: RunData,
    probes: Probes,
    log: RunLog,
    checkpoint: Checkpoint | None,
    pause: float | None = None,
) -> Tensor | None:
    """Train the adapters of `model`, from `checkpoint` on if there is one.

    Args:
        pause: see finetune.

    Returns:
        The scores of the validation samples at the last validation (see measures.score_rows), if there was one.

    Raises:
        Paused: if `pause` ends the run.
    """
    assert config.out_dir is not None
    scaled, total = scales_loss(config.precision), log.total
    objective = make_objective(fabric, config, data.scoring)
    learner = make_learner(fabric, model, config.optimizer, config.train, scaled, objective)
    start, last = 0, None
    if checkpoint:
        restore(fabric, model, learner.optimizer, checkpoint.state)
        repage(learner.optimizer)
        start = checkpoint.step
        if checkpoint.path.parent.samefile(config.out_dir):
            last = (start, config.out_dir / checkpoint.path.name)
    guard = Guard(config.guard, scaled=scaled)
    for record in log.records:
        if "loss" in record:
            guard.recall(record["loss"], record.get("skipped", False))
    with caught() as stop, explained(config.out_dir, data.tokenizer, partial(savings, config, data)):
        saver = Saver(config.out_dir, config.train, learner, Contents.of(config, data, learner, total), log, last)
        measured = partial(losses_of, fabric, model, config, data, objective=objective, stop=stop, show=log.validating)
        losses = measured(data.val_batches if data.val is None else data.val)
        measures: list[Measure] = [losses] if data.val_batches else []
        write = partial(keep_answers, config.out_dir, log, frames(data) if probes.questions else [])
        measures += more_measures(fabric, model, data, probes, config.eval.answers, write, stop, log.validating)
        if config.eval.train_samples:
            measures.append(seen_measure(measured(watch_list(config, data), name=LESSONS)))
        if probes.ask:
            tasks = tasks_measure(probes.ask, model, config.eval.tasks_every, total, log.records, log.validating)
            measures.append(Dispensable(fabric, model, "eval.tasks", tasks, stop))
        every = eval_every(config.eval, data, total)
        pause_at = None if pause is None else every * math.ceil(pause * total / every)

        def stopped() -> int:
            return agree(fabric, stop.signal)[0]

        validator = Validator(config.eval, every, total, measures, log, saver.keep, stopped)
        with stop.held():
            go_on = validator.catch_up(log.records, start)
            if number := stopped():
                raise Stopped(number, start)
            if not go_on or start == total:
                saver(start, True)
                tell_early_end(validator, log, total)
                return losses.scores
            if pause_at is not None and start >= pause_at:
                raise Paused(start, total)
            on_gpu = fabric.device.type == "cuda"
            records = train(
                learner,
                steps(data.train, data.batching, total, *share_of_steps(fabric, model), start),
                total,
                config.train,
                guard,
                seed=config.seed,
                start=start,
                seconds=log.seconds,
                longest=longest_step(data.train, data.batching, share_of_steps(fabric, model)[1]) if on_gpu else None,
                stop=stop if fabric.world_size == 1 else None,  # other processes would wait for the missing part
            )
            follow(
                records, fabric, total, log=log, save=saver, validate=validator, stop=stop, start=start, pause=pause_at
            )
            tell_early_end(validator, log, total)
            if warning := falling(log.records):
                log.say(f"  note    {warning}")
    return losses.scores


def tell_early_end(validator: Validator, log: RunLog, total: int) -> None:
    """Tell why a run ended before its `total` steps, if it did."""
    if not validator.go_on and validator.best and log.records[-1]["step"] < total:
        log.say(
            f"  note    ended early: {validator.config.best} did not improve after step {validator.best[1]}; "
            "--extend with a larger --eval.patience goes on"
        )


def keep_answers(out_dir: Path, log: RunLog, frames: Sequence[Frame], step: int, records: list[Record]) -> None:
    """Put the answers of a validation into OUT/samples.jsonl, which has each step once, and show a few."""
    write_log(out_dir / SAMPLES, [*read_log(out_dir / SAMPLES, step - 1), *records])
    free = [record for record in records if "wanted" not in record]
    for record in (free or records)[:SHOWN]:
        _, question = unframed(record["prompt"], frames)
        log.say(f"  answer  {one_line(question, 60)} -> {one_line(record['answer'], 100)}")


@contextmanager
def explained(out_dir: Path, tokenizer: Tokenizer, advice: Callable[[], str]) -> Iterator[None]:
    """Turn a bad step, lost memory or a lost process into an error that says what to look at or to change.

    Args:
        advice: lists changes that need less memory.
    """
    try:
        yield
    except BadStepError as error:
        step = error.step
        path = out_dir / "bad_batch.json"
        rows = [
            {"tokens": tokens, "labels": labels, "text": tokenizer.decode(tokens)}
            for batch in step.batches
            for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        ]
        facts = {"error": str(error), "epoch": step.epoch, "samples": list(step.numbers), "rows": rows}
        write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        saved = checkpoints(out_dir)
        good = f"the newest checkpoint is {saved[0]}" if saved else "no checkpoint was due before it"
        raise NumericalError(f"{error}\nIts samples are in {path}; {good}.") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise ResourceError(f"Out of memory. {reason}\n{advice()}") from None
    except RuntimeError as error:
        if not is_about_another_process(error):
            raise
        raise LostProcessError(resume_advice(out_dir)) from None
