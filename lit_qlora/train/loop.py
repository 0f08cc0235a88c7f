"""The training loop: steps in, an updated adapter out. It knows neither LoRA nor quantisation nor files."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor

from lit_qlora.data import Step
from lit_qlora.data.batches import AnyBatch
from lit_qlora.device import peak_gib
from lit_qlora.errors import NumericalError, ResourceError, UserError
from lit_qlora.model.gpt import GPT, Gathers
from lit_qlora.model.mlp import Seen
from lit_qlora.report import tell
from lit_qlora.settings import TrainConfig
from lit_qlora.signals import StopRequest, describe
from lit_qlora.train.guards import Guard, check_first_gradients
from lit_qlora.train.objective import CrossEntropy, Objective
from lit_qlora.train.optim import learning_rate
from lit_qlora.train.parallel import sum_gradients
from lit_qlora.train.routers import METRICS, RouterHealth, RouterLosses, count_choices

Record = dict[str, Any]
BatchKind = TypeVar("BatchKind", bound=AnyBatch)


class BadStepError(NumericalError):
    """A step had a bad loss or bad gradients.

    Attributes:
        step: its micro-batches, for a closer look.
    """

    def __init__(self, message: str, step: Step) -> None:
        super().__init__(message)
        self.step = step


class Stopped(UserError):  # noqa: N818 - not an error, but it ends the run like one
    """A signal ended the run; everything is saved."""

    prefix = ""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{describe(number)} at step {step}; go on with --resume auto")
        self.status = 128 + number


class Paused(UserError):  # noqa: N818 - not an error, but it ends the run like one
    """The run was to end here for now; everything is saved.

    Attributes:
        step: steps done.
        total: steps of the run.
    """

    prefix = ""

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"paused at step {step} of {total}; go on with --resume auto")
        self.step, self.total = step, total


class Saving(Protocol):
    """The checkpoints of a run."""

    def due(self, step: int) -> bool:
        """Say whether it is time to save after `step` steps."""
        ...

    def __call__(self, step: int, over: bool) -> None:
        """Save the state after `step` steps, as the final one if the run is over."""
        ...


class Validation(Protocol):
    """The validations of a run."""

    def due(self, step: int) -> bool:
        """Say whether it is time to validate after `step` steps."""
        ...

    def __call__(self, step: int) -> bool:
        """Validate; False ends the run early."""
        ...


class Learner:
    """A model that learns, with its optimizer, in Fabric.

    Attributes:
        module: the model itself.
        model: the model as Fabric calls it.
        trainable: its parameters that learn, by name.
        hits: () int64, labelled tokens of this process that the last step predicted right; see GPT.
        routers: what is known of its experts' routers.
        losses: of these routers, if there are any; they are no part of the loss in the log.
        objective: the loss of a micro-batch.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: GPT,
        optimizer: torch.optim.Optimizer,
        losses: RouterLosses | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.fabric, self.module = fabric, module
        self.model, self.optimizer = fabric.setup(module, optimizer)
        self.model.mark_forward_method("loss")
        self.model.mark_forward_method("token_losses")
        self.model.mark_forward_method("scores")
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.hits = module.hits = torch.zeros((), dtype=torch.int64, device=fabric.device)
        self.objective: Objective = objective or CrossEntropy()
        kind = Gradients if module.gathers is None else InStep
        self.add_gradients = kind(fabric, self.model, self.hits, losses, self.objective)
        self.routers, self.losses = RouterHealth(module), losses

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this global norm; 0 leaves them. Returns the norm that they had."""
        norm = self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=max_norm or math.inf, error_if_nonfinite=False
        )
        assert isinstance(norm, Tensor)
        return norm


def train(
    learner: Learner,
    steps: Iterable[Step],
    total: int,
    config: TrainConfig,
    guard: Guard,
    *,
    seed: int = 0,
    start: int = 0,
    seconds: float = 0.0,
    longest: Step | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Record]:
    """Take one optimizer step for each of `steps`, up to number `total`, and yield its record for the log.

    The loss of a step is the mean over all its labelled tokens, or as data.weighting weighs them. The split into rows,
    micro-batches and devices makes no difference. So packing and train.micro_batch_size change memory and speed but not
    the result. Randomness in a step depends on `seed` and the step's number alone, so a run can resume after any step.
    Time between two steps, which goes to validating and saving, counts in no step's tokens per second.

    Args:
        steps: the steps after `start`.
        start: steps done before.
        seconds: time they took.
        longest: a step that is computed and forgotten before the first one, so that memory runs out at once or never.
        stop: a signal that it takes ends the steps, between two micro-batches, or anywhere in the first step, which
            compiles kernels. The step that was begun is not taken.

    Raises:
        BadStepError: if the loss of a step is not finite; the step is not taken. Or as the guard decides.
        torch.OutOfMemoryError: if not even single rows fit.
    """
    fabric, optimizer, stop = learner.fabric, learner.optimizer, stop or StopRequest()
    begin = before = time.monotonic()
    paused = 0.0  # seconds that the caller took after the last step
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    names = (*METRICS, *(learner.losses.names if learner.losses else ()))
    learner.model.train()
    if longest:
        if stop.unless_stopped(partial(learner.add_gradients, longest), None, saved=True) is None:
            return
        optimizer.zero_grad()
        learner.routers.forget()
        if fabric.is_global_zero:
            tell(f"  memory  {peak_gib(fabric.device):.2f} GiB at the peak of the longest micro-batch")
    for done, step in enumerate(steps, start=start + 1):
        take = partial(learner.add_gradients, step, seed_of(seed, done, fabric.global_rank), stop)
        part = stop.unless_stopped(take, None, saved=True) if done == start + 1 else take()
        if part is None:
            return
        loss, hits = sum_over_ranks(fabric, torch.stack((part, learner.hits.to(part))))
        sum_gradients(fabric, (p for group in optimizer.param_groups for p in group["params"]))
        norm = learner.clip_gradients(config.max_norm)
        of_routers = learner.routers.measure(partial(sum_over_ranks, fabric))
        if learner.losses:
            of_routers = torch.cat((of_routers, sum_over_ranks(fabric, learner.losses.values.clone())))
        of_objective = loss.new_zeros(0)
        if learner.objective.sums is not None:
            of_objective = sum_over_ranks(fabric, learner.objective.sums.clone())
        metrics = torch.cat((torch.stack((loss, norm.to(loss), hits)), of_objective, of_routers))
        loss_value, norm_value, hit_count, *others = metrics.tolist()
        check_gathers(learner.module.gathers, done)
        sums, health = others[: len(of_objective)], others[len(of_objective) :]
        try:
            guard.check_loss(done, loss_value)
            may_update = guard.may_update(done, norm_value)
        except NumericalError as error:
            raise BadStepError(str(error), step) from None
        if done == 1 and may_update:
            check_first_gradients(learner.trainable.items())
        rate = learning_rate(done - 1, total, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        if may_update or scaler:  # a scaler skips the update by itself, and lowers its scale
            optimizer.step()
        optimizer.zero_grad()

        now = time.monotonic()
        record = {
            "step": done,
            "epoch": round(step.epoch, 4),
            "loss": loss_value,
            **({"accuracy": hit_count / max(1, step.labelled)} if learner.objective.predicts else {}),
            "lr": rate,
            "grad_norm": norm_value,
            "tokens": step.tokens,
            "samples": step.samples,
            "tokens_per_second": round(step.tokens / max(now - before - paused, 1e-9), 1),
            "peak_gib": round(peak_gib(fabric.device), 3),
            "seconds": round(seconds + now - begin, 3),
            **{name: round(value, 6) for name, value in learner.objective.measure(sums).items()},
            **{name: round(value, 4) for name, value in zip(names, health, strict=False)},
        }
        before = now
        yield record if may_update else {**record, "skipped": True}
        paused = time.monotonic() - now


def follow(
    records: Iterable[Record],
    fabric: Fabric,
    total: int,
    *,
    log: Callable[[Record], None],
    save: Saving,
    validate: Validation,
    stop: StopRequest,
    start: int = 0,
    pause: int | None = None,
) -> None:
    """Take the steps of `train`, and after each log its record, save and validate if that is due, and stop if asked.

    Args:
        start: steps done before.
        pause: step after which the run ends for now, if it is not the last.

    Raises:
        Stopped: after saving, if `stop` has taken a signal.
        Paused: after saving, at the step `pause`.
    """
    done = start
    for record in records:
        log(record)
        done = record["step"]
        stop_number, save_due, validation_due = agree(fabric, stop.signal, save.due(done), validate.due(done))
        if save_due or stop_number or done == total:
            save(done, done == total)  # before the validation, which may fail
        if validation_due and not stop_number:
            go_on = validate(done)
            (stop_number,) = agree(fabric, stop.signal)
            early = not go_on and not stop_number
            if done < total and (stop_number or early):
                save(done, early)
            if early:
                return
        if stop_number:
            raise Stopped(stop_number, done)
        if done == pause and done < total:
            save(done, False)
            raise Paused(done, total)
    (stop_number,) = agree(fabric, stop.signal)
    if stop_number:
        if start < done < total:  # a step was given up
            save(done, False)
        raise Stopped(stop_number, done)


class Gradients:
    """Forward and backward passes of a step, in smaller micro-batches once memory has run out.

    Args:
        hits: of the model; it is set to zero before each step.
        losses: of the routers, which are added to the model's.
        objective: the loss of a micro-batch.

    Attributes:
        rows: most rows of a micro-batch; None does not limit them.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: _FabricModule,
        hits: Tensor,
        losses: RouterLosses | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.fabric, self.model, self.hits, self.losses = fabric, model, hits, losses
        self.objective: Objective = objective or CrossEntropy()
        self.rows: int | None = None

    def __call__(self, step: Step, seed: int = 0, stop: StopRequest | None = None) -> Tensor | None:
        """Add the gradients of a step to the parameters', and return this process's part of its loss.

        Args:
            stop: once it has taken a signal, no further micro-batch is begun, and None is returned.
        """
        counts: Tensor | None = None
        prepared = False
        while True:
            torch.manual_seed(seed)
            self.hits.zero_()
            batches = [part for batch in step.batches for part in split_rows(batch, self.rows)]
            try:
                if not prepared:  # once, as below
                    self.objective.prepare(self.model, batches, partial(sum_over_ranks, self.fabric))
                    torch.manual_seed(seed)
                    prepared = True
                if self.losses and self.losses.balances and counts is None:  # once, for other processes take part
                    counts = self._count_choices(step, batches, seed)
                return self._take(step, batches, counts, stop)
            except torch.OutOfMemoryError:
                # Processes that share a row wait for this one in the middle of it, so nothing can be repeated.
                if self.model.rows is not None or not self._can_need_less(batches):
                    raise
            # The exception held tensors; only here it is gone.
            self.model.zero_grad()
            self._need_less(batches)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _can_need_less(self, batches: list[AnyBatch]) -> bool:
        return _widest(batches) > 1 or bool(self.model.can_release)

    def _masks(self, batches: list[AnyBatch], step: Step) -> Iterator[Tensor]:
        """For the positions that this process computes, which are not padding, (B T,) each."""
        rows = self.model.rows
        for batch, mask in zip(batches, masks(batches, step), strict=True):
            yield mask if rows is None else rows.part(mask.view_as(batch.tokens)).flatten()

    def _need_less(self, batches: list[AnyBatch]) -> None:
        """Take less memory from now on."""
        if not self.model.release():
            widest = _widest(batches)
            self.rows = (widest + 1) // 2
            tell(f"  memory  {widest} rows at a time did not fit; the step is repeated with {self.rows}")

    def _take(
        self, step: Step, batches: list[AnyBatch], counts: Tensor | None, stop: StopRequest | None
    ) -> Tensor | None:
        loss = self._start()
        for batch, mask in zip(batches, self._masks(batches, step), strict=True):
            if stop and stop.signal:
                return None
            loss += self._pass(batch, mask, step, counts)
        return loss

    def _start(self) -> Tensor:
        """The loss before the first micro-batch; what they add up is zero again."""
        if self.losses:
            self.losses.values.zero_()
        if self.objective.sums is not None:
            self.objective.sums.zero_()
        return torch.zeros((), device=self.fabric.device)

    def _pass(self, batch: AnyBatch, mask: Tensor, step: Step, counts: Tensor | None) -> Tensor:
        """The loss of a micro-batch, after its backward pass."""
        watched: AbstractContextManager[Seen] = self.losses.watched() if self.losses else nullcontext([])
        with watched as seen:
            part = whole = self.objective.loss(self.model, pinned(batch, self.fabric.device), step)
        if self.losses:
            whole = part + self.losses.loss(seen, mask.to(part), step.tokens - step.samples, counts)
        self.fabric.backward(whole)
        return part.detach()

    def _count_choices(self, step: Step, batches: list[AnyBatch], seed: int) -> Tensor | None:
        """Choices of each expert in the step, (n_expert,), from one more forward pass; None if one pass is enough."""
        assert self.losses
        if len(batches) == self.fabric.world_size == 1:
            return None
        counts = torch.zeros(self.losses.config.n_expert, device=self.fabric.device)
        self._look(list(zip(batches, self._masks(batches, step), strict=True)), counts)
        torch.manual_seed(seed)  # so that dropout repeats
        self.hits.zero_()
        return sum_over_ranks(self.fabric, counts)

    def _look(self, batches: list[tuple[AnyBatch, Tensor]], counts: Tensor) -> None:
        """Add the choices of experts in these micro-batches, which come with their masks."""
        for batch, mask in batches:
            self._add_choices(batch, mask, counts)

    @torch.no_grad()
    def _add_choices(self, batch: AnyBatch, mask: Tensor, counts: Tensor) -> None:
        assert self.losses
        with self.losses.watched() as seen:
            self.model.loss(*pinned(batch, self.fabric.device)[:5])
        counts += count_choices(seen, mask.to(counts))


class InStep(Gradients):
    """Gradients in processes that gather the weights of blocks together, see lit_qlora.sharded.

    All make as many passes as the one with most micro-batches. Where memory runs out in one of them, it completes all
    passes of the step without computing, and then all repeat the step.
    """

    _failed = False

    def _take(
        self, step: Step, batches: list[AnyBatch], counts: Tensor | None, stop: StopRequest | None
    ) -> Tensor | None:
        loss = self._start()

        def add(batch: AnyBatch, mask: Tensor) -> None:
            loss.add_(self._pass(batch, mask, step, counts))

        mine = list(zip(batches, self._masks(batches, step), strict=True))
        return loss if self._together(mine, add, stop=stop) else None

    def _look(self, batches: list[tuple[AnyBatch, Tensor]], counts: Tensor) -> None:
        self._together(batches, lambda batch, mask: self._add_choices(batch, mask, counts), backward=False)

    def _together(
        self,
        mine: list[tuple[AnyBatch, Tensor]],
        do: Callable[[AnyBatch, Tensor], None],
        backward: bool = True,
        stop: StopRequest | None = None,
    ) -> bool:
        """Make a pass for each micro-batch of the process with most; False if a signal ended it.

        Raises:
            torch.OutOfMemoryError: in all processes, if the memory of one ran out. Where rows lie over several, in that
            one alone.
        """
        gathers, self._failed = self.model.module.gathers, False
        (passes,) = agree(self.fabric, len(mine))
        for i in range(passes):
            if self.fabric.world_size == 1 and stop and stop.signal:
                return False
            gathers.begin()
            try:
                if i < len(mine) and not self._failed:
                    do(*mine[i])
            except torch.OutOfMemoryError:
                if self.model.rows is not None:
                    raise
                self._failed = True
            gathers.complete(backward)
        if any(agree(self.fabric, int(self._failed))):
            raise torch.OutOfMemoryError("The memory of this process or another one ran out.")
        return True

    def _can_need_less(self, batches: list[AnyBatch]) -> bool:
        stuck = self._failed and not super()._can_need_less(batches)
        return not any(agree(self.fabric, int(stuck)))

    def _need_less(self, batches: list[AnyBatch]) -> None:
        if self._failed:
            super()._need_less(batches)


def check_gathers(gathers: Gathers | None, step: int) -> None:
    """Raise ResourceError in all processes if they gathered different blocks, before the update of this step."""
    if gathers is not None and gathers.differs():
        raise ResourceError(
            f"The processes gathered different blocks of the base up to step {step}, so its gradients may be wrong.\n"
            "The step is not taken. Check that all processes run the same program and settings, and resume."
        )


def _widest(batches: Iterable[AnyBatch]) -> int:
    """Rows of the largest micro-batch."""
    return max((len(batch.tokens) for batch in batches), default=0)


def split_rows(batch: AnyBatch, rows: int | None) -> list[AnyBatch]:
    """Split `batch` into parts of at most `rows` rows."""
    if rows is None or len(batch.tokens) <= rows:
        return [batch]
    starts = range(0, len(batch.tokens), rows)
    kind: Any = type(batch)
    return [kind(*(None if t is None else t[i : i + rows] for t in batch)) for i in starts]


def masks(batches: Iterable[AnyBatch], step: Step) -> Iterator[Tensor]:
    """For the rows of `step` in these parts, which positions are not padding, (B T,)."""
    filled = iter(step.filled)
    for batch in batches:
        rows, length = batch.tokens.shape
        ends = torch.tensor([next(filled, length) for _ in range(rows)])
        yield (torch.arange(length) < ends[:, None]).flatten()


def seed_of(seed: int, step: int, rank: int) -> int:
    """Derive the seed of a step's randomness, such as dropout, in one process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())


def pinned(batch: BatchKind, device: torch.device) -> BatchKind:
    """Pin the batch in host memory, so that `device` reads it while the host goes on; the model moves it."""
    if device.type == "cpu":
        return batch
    kind: Any = type(batch)
    pinned_batch: BatchKind = kind(*(None if t is None else t.pin_memory() for t in batch))
    return pinned_batch


def share_of_steps(fabric: Fabric, model: GPT) -> tuple[int, int]:
    """The number of this process's share of the rows of each step, and the number of shares.

    Processes that share each row have the same.
    """
    rows = model.rows
    return (fabric.global_rank, fabric.world_size) if rows is None else (rows.group, rows.groups)


def sum_over_ranks(fabric: Fabric, value: Tensor) -> Tensor:
    """Sum `value` over all processes."""
    if fabric.world_size == 1:
        return value
    total = fabric.all_reduce(value, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def agree(fabric: Fabric, *flags: int) -> tuple[int, ...]:
    """Return the largest of each flag over all processes, whose clocks and signals differ."""
    if fabric.world_size == 1:
        return flags
    agreed = fabric.all_reduce(torch.tensor(flags, device=fabric.device), reduce_op="max")
    assert isinstance(agreed, Tensor)
    return tuple(agreed.tolist())
