"""Measures of a validation: loss and accuracy of tokens, quality of answers, distance to the base."""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.data import RunData
from lit_qlora.data.batches import SampleBatch, TaughtBatch
from lit_qlora.evaluate.judge import Judge, Judged, JudgeError
from lit_qlora.evaluate.metrics import chrf, text_metrics
from lit_qlora.evaluate.validation_inputs import Ask, Probes, Question, stop_ids
from lit_qlora.generation import generate
from lit_qlora.generation.sequences import evaluating
from lit_qlora.lora.layer import without_adapters
from lit_qlora.model.gpt import GPT, IGNORE, LOGITS_AT_ONCE
from lit_qlora.model.lesson import divergence, mix
from lit_qlora.report import Record, tell
from lit_qlora.settings import DistillConfig, GenerationConfig
from lit_qlora.signals import StopRequest
from lit_qlora.train.loop import agree, pinned, share_of_steps, sum_over_ranks

Measure = Callable[[int], Record]
"""Returns metrics for the record of the validation after so many steps."""

Show = Callable[[int, str], object]
"""Shows what is being measured at the validation after so many steps."""

ANSWERS_AT_ONCE = 16
LONGEST_REPLY = 1000
"""Characters that are written of a judge's reply without a score."""
ROWS = 16
"""Rows of a matrix product are padded to a multiple of this: MKL's product of, say, 5 rows depends on its threads."""


def more_measures(
    fabric: Fabric,
    model: GPT,
    data: RunData,
    probes: Probes,
    how: GenerationConfig,
    write: Callable[[int, list[Record]], object],
    stop: StopRequest | None = None,
    show: Show = lambda step, what: None,
) -> list[Measure]:
    """Make the measures of a validation that need the model to answer, or its base.

    Args:
        how: answers are made, see EvalConfig.answers.
        write: takes the answers of each validation, with their prompts.
        stop: a signal that it takes ends a measure.
    """
    extras: dict[str, Measure] = {}
    if probes.questions or probes.prompts:
        extras["the answers"] = lambda step: _answers(model, data, probes, how, step, write, show)
    if probes.text:
        extras["the distance to the base"] = lambda step: {
            "kl_to_base": kl_to_base(fabric, model, probes.text[: model.config.block_size])
        }
    return [Dispensable(fabric, model, name, measure, stop) for name, measure in extras.items()]


def tasks_measure(
    ask: Ask,
    model: GPT,
    every: int | None,
    total: int,
    records: Sequence[Record],
    show: Show = lambda step, what: None,
) -> Measure:
    """Ask the tasks before the first step, after the last, and in between after at least `every` steps.

    Args:
        records: records of the run so far; each validation reads them again.
    """

    def measure(step: int) -> Record:
        asked = [record["step"] for record in records if any("/" in name for name in record)]
        if asked and step != total and step - asked[-1] < (every or 1):
            return {}
        show(step, "tasks")
        return ask(model)

    return measure


class Losses:
    """Loss per labelled token, perplexity, and the share of labelled tokens predicted; processes divide the work.

    Args:
        write: takes, in the first process, the step of each validation and its scores.
        distill: what the loss is where batches have a teacher.

    Attributes:
        scores: (S, 3 or 4) float64 of the last call, see score_rows; None before it.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: GPT,
        batches: Sequence[SampleBatch],
        stop: StopRequest | None = None,
        write: Callable[[int, Tensor], object] | None = None,
        show: Show = lambda step, what: None,
        distill: DistillConfig | None = None,
    ) -> None:
        self.fabric, self.model, self.batches, self.stop = fabric, model, batches, stop or StopRequest()
        self.write, self.show, self.distill = write, show, distill or DistillConfig()
        self.scores: Tensor | None = None

    def __call__(self, step: int) -> Record:
        """See Measure. The record is empty if a signal cut it short."""
        temperature = self.distill.temperature
        scores = score_rows(self.fabric, self.model, self.batches, self.stop, partial(self.show, step), temperature)
        if scores is None:
            return {}
        self.scores = scores
        if self.write and self.fabric.is_global_zero:
            self.write(step, scores)
        entropy, right, labelled, *divergence = scores.sum(dim=0).tolist()
        loss = entropy / labelled
        metrics = {"val_ppl": math.exp(min(loss, 700.0)), "val_accuracy": right / labelled}  # float64 overflows beyond
        if not divergence:
            return {"val_loss": loss, **metrics}
        apart = divergence[0] / labelled
        mixed = mix(loss, apart, self.distill.weight, self.distill.temperature)
        return {"val_loss": mixed, "val_cross_entropy": loss, "val_teacher_kl": apart, **metrics}


def score_rows(
    fabric: Fabric,
    model: GPT,
    batches: Sequence[SampleBatch],
    stop: StopRequest,
    show: Callable[[str], object] = lambda what: None,
    temperature: float = 1.0,
) -> Tensor | None:
    """Score each row: the sum of its losses, its labelled tokens that the model predicts, and all its labelled tokens.

    Where batches have a teacher, the sum of the divergences from it, at `temperature`, is a fourth score.
    It computes the logits of labelled tokens alone, a slice at a time, and restores the model's mode.

    Returns:
        (S, 3 or 4) float64 on the host, the same in every process; None if a signal to any of them cut it short.
    """
    if fabric.world_size > 1 and (model.gathers is not None or model.rows is not None):
        scores = _scores_in_step(fabric, model, batches, show, temperature, stop)
    else:
        scores = stop.unless_stopped(partial(_own_scores, fabric, model, batches, show, temperature), None)
    if agree(fabric, stop.signal)[0] or scores is None:
        return None
    return sum_over_ranks(fabric, scores).cpu()


@torch.no_grad()
def _own_scores(
    fabric: Fabric, model: GPT, batches: Sequence[SampleBatch], show: Callable[[str], object], temperature: float
) -> Tensor:
    """Score the rows of this process, and leave those of the others 0."""
    mine, scores = _own_rows(fabric, model, batches)
    with evaluating(model), fabric.autocast():
        for batch, start in mine:
            show(f"losses, {start:,} of {len(scores):,} samples")
            _add_scores(fabric, model, batch, start, scores, temperature)
    return scores


@torch.no_grad()
def _scores_in_step(
    fabric: Fabric,
    model: GPT,
    batches: Sequence[SampleBatch],
    show: Callable[[str], object],
    temperature: float,
    stop: StopRequest,
) -> Tensor | None:
    """As _own_scores, in processes that all make the same passes; a signal to one of them ends all between two."""
    mine, scores = _own_rows(fabric, model, batches)
    with evaluating(model), fabric.autocast():
        for i in range(-(-len(batches) // share_of_steps(fabric, model)[1])):
            if agree(fabric, stop.signal)[0]:
                return None
            if model.gathers is not None:
                model.gathers.begin()
            if i < len(mine):
                batch, start = mine[i]
                show(f"losses, {start:,} of {len(scores):,} samples")
                _add_scores(fabric, model, batch, start, scores, temperature)
            if model.gathers is not None:
                model.gathers.complete(backward=False)
    return scores


def _own_rows(
    fabric: Fabric, model: GPT, batches: Sequence[SampleBatch]
) -> tuple[list[tuple[SampleBatch, int]], Tensor]:
    """The batches of this process, each with the number of its first row, and room for the scores of all rows."""
    starts = list(accumulate((len(batch.tokens) for batch in batches), initial=0))
    columns = 4 if any(isinstance(batch, TaughtBatch) for batch in batches) else 3
    scores = torch.zeros(starts[-1], columns, dtype=torch.float64, device=fabric.device)
    number, shares = share_of_steps(fabric, model)
    return list(zip(batches, starts, strict=False))[number::shares], scores


def _add_scores(fabric: Fabric, model: GPT, batch: SampleBatch, start: int, scores: Tensor, temperature: float) -> None:
    """Add the scores of a batch, or of the part of its rows that this process has; its first row is number `start`."""
    at_once = ROWS * max(1, LOGITS_AT_ONCE // (ROWS * model.config.vocab_size))
    here = pinned(batch, fabric.device)
    tokens, labels = (t.to(fabric.device, non_blocking=True) for t in (here.tokens, here.labels))
    if model.rows is not None:
        labels = model.rows.part(labels, IGNORE)
    rows, columns = (labels >= 0).nonzero(as_tuple=True)
    hidden, wanted = model.hidden(tokens)[rows, columns], labels[rows, columns]
    told = [part[batch.labels >= 0].split(at_once) for part in batch[5:]]  # what a teacher holds likely
    for part, ids, row, *likely in zip(*(t.split(at_once) for t in (hidden, wanted, start + rows)), *told, strict=True):
        padded = F.pad(part, (0, 0, 0, -len(part) % ROWS))
        log_probs = model.logits(padded)[: len(part)].float().log_softmax(dim=-1)
        found = log_probs.gather(-1, ids[:, None])[:, 0]
        right = log_probs.argmax(dim=-1) == ids
        each = [-found.double(), right.double(), torch.ones_like(right, dtype=torch.float64)]
        if likely:
            known, wanted_there = (one.to(fabric.device) for one in likely)
            each.append(divergence(log_probs, known, wanted_there, temperature).double())
        scores.index_add_(0, row, torch.stack(each, 1))


class Dispensable:
    """A measure that only the first process takes; if it fails, a note says so, and its metrics are left out."""

    def __init__(
        self, fabric: Fabric, model: GPT, name: str, measure: Measure, stop: StopRequest | None = None
    ) -> None:
        self.fabric, self.model, self.name, self.measure = fabric, model, name, measure
        self.stop = stop or StopRequest()

    def __call__(self, step: int) -> Record:
        """See Measure. The record is empty if a signal cut it short."""
        record: Record = {}
        gathers = self.model.gathers
        if self.fabric.is_global_zero:
            try:
                with nullcontext() if gathers is None else gathers.led():
                    record = self.stop.unless_stopped(partial(self._measured, step), record)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                tell(f"  note    {self.name} after step {step} failed: {type(error).__name__}: {reason}", sys.stderr)
        elif gathers is not None:
            gathers.follow()
        shared: Record = self.fabric.broadcast(record)
        return shared

    def _measured(self, step: int) -> Record:
        """Measure; if memory runs out, release cached weights and measure again."""
        try:
            with undisturbed(self.model):
                return self.measure(step)
        except torch.OutOfMemoryError:
            if not self.model.can_release:
                raise
        self.model.release()  # the exception held tensors; only here it is gone
        with undisturbed(self.model):
            return self.measure(step)


@contextmanager
def undisturbed(model: GPT) -> Iterator[None]:
    """Evaluate the model inside, on whole rows, and restore its mode and all random state afterwards."""
    state, rows = random.getstate(), model.rows
    model.rows = None  # other processes do not take part
    try:
        with evaluating(model), torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        model.rows = rows
        random.setstate(state)


def _answers(
    model: GPT,
    data: RunData,
    probes: Probes,
    how: GenerationConfig,
    step: int,
    write: Callable[[int, list[Record]], object],
    show: Show,
) -> Record:
    """Let the model answer, and compare with the known answers."""
    asked = [*probes.questions, *probes.prompts]
    answers = answer(model, data, asked, how, partial(show, step))
    words = [
        data.style.reader(data.tokenizer, q.ids).whole(text).content.strip()
        for q, text in zip(asked, answers, strict=True)
    ]
    records: list[Record] = [
        {"step": step, "prompt": q.prompt, "answer": text} | ({"compared": said} if said != text else {})
        for q, text, said in zip(asked, answers, words, strict=True)
    ]
    known = words[: len(probes.questions)]
    for record, q, said in zip(records, probes.questions, known, strict=False):
        record |= {"wanted": q.wanted, "chrf": chrf(said, q.wanted)}
    _tell_of_thoughts(step, records[: len(known)])
    metrics = text_metrics(known, [q.wanted for q in probes.questions]) if known else {}
    if probes.judge:
        show(step, f"judge, {len(known):,} answers")
        metrics |= judged(probes.judge, records[: len(known)], step)
    write(step, records)
    return metrics


def _tell_of_thoughts(step: int, records: Sequence[Record]) -> None:
    """Note that metrics leave thoughts out, and which answers are nothing else."""
    thoughtful = [record["compared"] for record in records if "compared" in record]
    if not thoughtful:
        return
    silent = sum(not said for said in thoughtful)
    more = f"; {silent} of them end within it, so raise --eval.max_new_tokens" if silent else ""
    told = f"{len(thoughtful)} of {len(records)} answers are compared without their thought{more}"
    tell(f"  note    after step {step}, {told}", sys.stderr)


def judged(judge: Judge, records: Sequence[Record], step: int) -> Record:
    """Put the judge's score into the record of each answer, and return their mean.

    A note says why a score, or all of them, is missing.
    """
    try:
        replies = judge.replies(
            [Judged(r["prompt"], r["wanted"], r["compared"] if "compared" in r else r["answer"]) for r in records]
        )
    except JudgeError as error:
        tell(f"  note    no judgement after step {step}: {error}", sys.stderr)
        return {}
    scores = list(map(judge.read, replies))
    for record, score, reply in zip(records, scores, replies, strict=True):
        record.update({"judge_reply": reply[:LONGEST_REPLY]} if score is None else {"judge": score})
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        reply = " ".join(replies[scores.index(None)].split())[:80]
        missing = f"{len(scores) - len(found)} of {len(scores)} answers; it replied {reply!r}"
        tell(f"  note    after step {step} the judge gave no score to {missing}", sys.stderr)
    return {"judge": sum(found) / len(found)} if found else {}


def answer(
    model: GPT,
    data: RunData,
    questions: Sequence[Question],
    how: GenerationConfig,
    show: Callable[[str], object] = lambda what: None,
) -> list[str]:
    """Return the answers with their thoughts, in the order of the questions."""
    decoder = data.style.decoder(data.tokenizer)
    stops, room, most = stop_ids(data), model.config.block_size, how.max_new_tokens
    # A prompt that fills the context loses its beginning, so that at least half an answer has room.
    prompts = [question.ids[-(room - min(most, room // 2)) :] for question in questions]
    answers = [""] * len(questions)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        show(f"answers, {start:,} of {len(order):,}")
        some = order[start : start + ANSWERS_AT_ONCE]
        made = generate(model, [prompts[i] for i in some], how, stops, data.tokenizer.size)
        for i, ids in zip(some, made, strict=True):
            answers[i] = data.style.said(decoder.decode(ids)).strip()
    return answers


@torch.no_grad()
def kl_to_base(fabric: Fabric, model: GPT, ids: Sequence[int]) -> float:
    """Compute KL(base || model) in nats, the mean over the tokens of a text; it shows how much was forgotten."""
    tokens = torch.tensor([ids], device=fabric.device)
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    total = 0.0
    with evaluating(model), fabric.autocast():
        now = model.hidden(tokens)[0].split(at_once)
        with without_adapters(model):
            before = model.hidden(tokens)[0].split(at_once)
        for mine, theirs in zip(now, before, strict=True):
            adapted = model.logits(mine).float().log_softmax(dim=-1)
            with without_adapters(model):
                base = model.logits(theirs).float().log_softmax(dim=-1)
            total += float((base.exp() * (base - adapted)).sum(dtype=torch.float64))
    return total / len(ids)


def best_and_worst(scores: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Find the rows with the smallest mean losses and those with the largest; no row is in both.

    Args:
        scores: see score_rows.
    """
    order: Any = (scores[:, 0] / scores[:, 2]).argsort(stable=True).tolist()
    best = order[: min(count, -(-len(order) // 2))]
    return best, order[len(best) :][-count:][::-1]
