"""The loss of a step is the mean over its labelled tokens, however they are split."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.data import Batch, Batching, Sample, Samples, Step, count_steps, steps, validation_batches
from lit_qlora.errors import NumericalError
from lit_qlora.evaluate.measures import Losses
from lit_qlora.evaluate.validation import Validator
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import EvalConfig, GuardConfig, LoRAConfig, Scheme, TrainConfig
from lit_qlora.signals import StopRequest
from lit_qlora.train.guards import Guard
from lit_qlora.train.loop import Learner, follow, train
from tests.conftest import tiny_model


def random_samples(count: int) -> Samples:
    generator = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return Samples.of(
        Sample.of(torch.randint(1, 320, (number(6, 20),), generator=generator).tolist(), number(1, 5))
        for _ in range(count)
    )


SAMPLES = random_samples(11)
FEW = Samples.of(SAMPLES[:3])


class NothingSaved:
    """Checkpoints of a run that has none."""

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def __call__(self, step: int, over: bool) -> None:
        """Do nothing."""


def run(
    model: GPT, train_steps: Iterator[Step] | None = None, scheme: Scheme = "none", start: int = 0, **settings: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Two epochs of SGD on eleven samples, four a step; returns the adapter and the log."""
    config = TrainConfig(**{"batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.1, "epochs": 2.0} | settings)
    batching = Batching(batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seed=3)
    total = count_steps(len(SAMPLES), batching, config.epochs, config.max_steps)
    quantize_linears(model, scheme)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(dropout=0.0, targets=("all", "head")))
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    learner = Learner(fabric, model, optimizer)
    log: list[dict[str, Any]] = []
    train_steps = train_steps or steps(SAMPLES, batching, total, start=start)
    stop = StopRequest()
    measure = Losses(fabric, model, validation_batches(FEW, 2))
    validate = Validator(EvalConfig(), 2, total, [measure], log.append, lambda step: None, bool)
    validate.catch_up([], start)
    guard = Guard(GuardConfig())
    records = train(learner, train_steps, total, config, guard, start=start)
    follow(records, fabric, total, log=log.append, save=NothingSaved(), validate=validate, stop=stop)
    return lora_state(model), log


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batch_size_does_not_change_the_result(micro: int, scheme: Scheme) -> None:
    one, log = run(tiny_model(), scheme=scheme, micro_batch_size=micro)
    other, expected = run(tiny_model(), scheme=scheme)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(log, expected, strict=True):
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
        assert mine.get("tokens") == theirs.get("tokens")


def test_the_loss_of_a_step_is_the_mean_over_its_labelled_tokens() -> None:
    model = tiny_model()
    _, log = run(tiny_model(), micro_batch_size=1)
    step = next(steps(SAMPLES, Batching(batch_size=4, micro_batch_size=4, seed=3), total=1))
    with torch.no_grad():
        expected = model.loss(*step.batches[0]) / (step.batches[0].labels != IGNORE).sum()
    assert log[1]["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 4])
def test_the_accuracy_of_a_step_is_the_share_of_its_labelled_tokens_whose_argmax_is_the_label(micro: int) -> None:
    model = tiny_model()
    step = next(steps(SAMPLES, Batching(batch_size=4, micro_batch_size=4, seed=3), total=1))
    (batch,) = step.batches
    batch.labels[:, ::2] = torch.where(batch.labels == IGNORE, IGNORE, model(batch.tokens).argmax(dim=-1))[:, ::2]
    right = int((model(batch.tokens).argmax(dim=-1) == batch.labels).sum())
    rows = [Batch(*(None if t is None else t[i : i + micro] for t in batch)) for i in range(0, 4, micro)]
    _, log = run(tiny_model(), iter([step._replace(batches=rows)]), max_steps=1)
    assert log[1]["accuracy"] == right / step.labelled
    assert 0 < right < step.labelled


def test_validation_comes_before_during_and_after_and_weighs_tokens() -> None:
    model = tiny_model()
    _, log = run(tiny_model())
    validations = [record for record in log if "val_loss" in record]
    assert [record["step"] for record in validations] == [0, 2, 4, 6]
    batch = validation_batches(FEW, 3)[0]
    with torch.no_grad():
        expected = float(model.loss(*batch) / (batch.labels != IGNORE).sum())
    assert validations[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert validations[0]["val_ppl"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]


def test_every_sample_is_seen_once_an_epoch() -> None:
    _, log = run(tiny_model())
    records = [record for record in log if "loss" in record]
    assert sum(record["samples"] for record in records) == 2 * len(SAMPLES)
    assert sum(record["tokens"] for record in records) == 2 * sum(len(sample.tokens) for sample in SAMPLES)
    assert records[-1]["epoch"] == 2


def test_gradients_are_scaled_down_to_the_norm() -> None:
    free, log = run(tiny_model(), max_norm=0, max_steps=1, warmup=0)
    clipped, same = run(tiny_model(), max_norm=0.01, max_steps=1, warmup=0)
    assert log[1]["grad_norm"] == pytest.approx(same[1]["grad_norm"])
    fresh = run(tiny_model(), max_steps=1, learning_rate=1e-30)[0]
    moved = [torch.cat([(state[n] - fresh[n]).flatten() for n in fresh]).norm() for state in (free, clipped)]
    assert float(moved[0]) == pytest.approx(0.1 * log[1]["grad_norm"], rel=1e-3)
    assert float(moved[1]) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_loop_trains_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[set[bool]] = []
    loss = GPT.loss

    def watched(model: GPT, *batch: Tensor) -> Tensor:
        modes.append({module.training for module in model.modules()})
        return loss(model, *batch)

    monkeypatch.setattr(GPT, "loss", watched)
    run(tiny_model().eval(), max_steps=2)
    assert modes == [{True}, {True}]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    tokens = torch.full((1, 3), 7)
    poisoned = Step([Batch(tokens, tokens)], weight=3, labelled=3, tokens=3, samples=1, epoch=0.1)
    with pytest.raises(NumericalError, match="loss is nan at step 1; the step was not taken"):
        run(model, iter([poisoned]))
    assert not any(bool(t.any()) for name, t in lora_state(model).items() if name.endswith("lora_b"))
