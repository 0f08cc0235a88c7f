"""Learning rates are right at their ends; every optimizer learns on every base and goes on where it stopped."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.errors import UsageError
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import OPTIMIZERS, LoRAConfig, OptimizerConfig, Schedule, Scheme, TrainConfig
from lit_qlora.train.optim import SCHEDULES, check_schedule, learning_rate, make_optimizer, measure_state_bytes
from lit_qlora.train.training_state import pack, unpack
from tests.conftest import tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 320, (4, 17), generator=torch.Generator().manual_seed(0))
FALLING = sorted(set(SCHEDULES) - {"constant", "cosine-restarts"})


def rates(total: int, **settings: Any) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_every_schedule_that_can_be_named_is_in_the_table() -> None:
    assert tuple(SCHEDULES) == get_args(Schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3, 10, 25, 0.2])
@pytest.mark.parametrize("total", [10, 1])
def test_no_step_is_wasted_and_none_exceeds_the_peak(schedule: Schedule, warmup: float, total: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(total, schedule=schedule, warmup=warmup))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: Schedule) -> None:
    assert rates(10, warmup=4, schedule=schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_may_be_all_warm_up(schedule: Schedule) -> None:
    assert rates(4, warmup=4, schedule=schedule) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_can_be_a_share_of_the_run(schedule: Schedule) -> None:
    assert rates(10, warmup=0.2, schedule=schedule) == rates(10, warmup=2, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(schedule: Schedule) -> None:
    assert rates(10, warmup=0, schedule=schedule)[0] == 1
    assert rates(1, warmup=0.03, schedule=schedule) == [1]


@pytest.mark.parametrize("schedule", FALLING)
def test_after_the_warm_up_it_never_rises_and_ends_below_the_peak(schedule: Schedule) -> None:
    after = rates(50, warmup=5, schedule=schedule)[4:]
    assert all(a >= b for a, b in pairwise(after))
    assert after[-1] < 0.4


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("linear", 0.01), ("cosine", 0.5 * (1 - math.cos(math.pi / 100))), ("polynomial", 1e-4), ("wsd", 0.1)],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_last_step_is_one_before_the_floor(schedule: Schedule, last: float, floor: float) -> None:
    found = rates(100, warmup=0, schedule=schedule, floor=floor)[-1]
    assert found == pytest.approx(floor + (1 - floor) * last)


def test_cosine_is_at_half_the_peak_half_way() -> None:
    assert rates(100, warmup=0, schedule="cosine")[50] == pytest.approx(0.5)
    assert rates(100, warmup=0, schedule="linear")[50] == pytest.approx(0.5)


def test_restarts_are_at_the_peak() -> None:
    found = rates(70, warmup=10, schedule="cosine-restarts", cycles=3)
    assert [step for step, rate in enumerate(found) if rate == 1] == [9, 10, 30, 50]
    assert max(found[29], found[49], found[69]) < 0.01


@pytest.mark.parametrize(
    ("schedule", "settings", "theirs", "arguments", "later"),
    [
        ("constant", {}, "get_constant_schedule_with_warmup", {}, 0),
        ("linear", {}, "get_linear_schedule_with_warmup", {"num_training_steps": 60}, 0),
        ("cosine", {}, "get_cosine_schedule_with_warmup", {"num_training_steps": 60}, 0),
        (
            "cosine",
            {"floor": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": 60, "min_lr_rate": 0.1},
            0,
        ),
        (
            "cosine-restarts",
            {"cycles": 5},
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_training_steps": 60, "num_cycles": 5},
            0,
        ),
        (
            "polynomial",
            {"power": 3.0},
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": 60, "lr_end": 0.0, "power": 3.0},
            0,
        ),
        ("inverse-sqrt", {}, "get_inverse_sqrt_schedule", {}, 1),  # theirs counts from 0, the paper from 1
        (
            "wsd",
            {"decay": 20},
            "get_wsd_schedule",
            {"num_training_steps": 60, "num_decay_steps": 20, "decay_type": "linear"},
            0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_behind_the_warm_up_rates_are_those_of_transformers(
    schedule: Schedule, settings: dict, theirs: str, arguments: dict, later: int
) -> None:
    from transformers import optimization

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = getattr(optimization, theirs)(optimizer, num_warmup_steps=10, **arguments)
    expected = [scheduler.lr_lambdas[0](step + later) for step in range(10, 60)]
    assert rates(60, warmup=10, schedule=schedule, **settings)[10:] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.25, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [10, 33, 101])
def test_a_warm_up_from_zero_is_that_of_transformers(schedule: Schedule, warmup: float, total: int) -> None:
    from transformers import TrainingArguments, get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    steps = TrainingArguments(warmup_steps=warmup, use_cpu=True).get_warmup_steps(total)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=total)
    expected = [scheduler.lr_lambdas[0](step) for step in range(total)]
    assert rates(total, warmup=warmup, warmup_from_zero=True, schedule=schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 11}, "train.warmup is 11 steps, but the run has only 10"),
        ({"schedule": "wsd", "warmup": 6, "decay": 5}, r"train.warmup \(6 steps\) and train.decay \(5\) do not fit"),
        ({"schedule": "cosine-restarts", "warmup": 8}, "train.cycles is 3, but after the warm-up .* only 2 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_into_the_run_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_schedule(TrainConfig(**settings), 10)


# Optimizers.

RATES = {"sgd": 0.1, "adadelta": 10.0, "adafactor": 1.0}
"""Where 0.005 is not a good rate."""


def settings_of(name: str, **changes: Any) -> tuple[OptimizerConfig, TrainConfig]:
    small = (
        {"min_8bit_size": 16} if "8bit" in name.lower() else {}
    )  # by default the state of small tensors stays float32
    return OptimizerConfig(name=name, options=small, **changes), TrainConfig(learning_rate=RATES.get(name, 0.005))


def adapted(scheme: Scheme = "none") -> GPT:
    model = tiny_model().train()
    quantize_linears(model, scheme)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(dropout=0.0, targets="all"))
    return model


def learn(model: GPT, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[float]:
    for _ in range(steps):
        loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:]) / TOKENS[:, 1:].numel()
        yield float(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4", "bnb.nf4-dq", "bnb.int8"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_on_every_base(name: str, scheme: Scheme) -> None:
    model = adapted(scheme)
    optimizer = make_optimizer(model.named_parameters(), *settings_of(name))
    losses = list(learn(model, optimizer, 4))  # the last one is the loss behind the third step
    assert losses[3] < losses[0] - 0.02


def through_files(state: dict, folder: Path) -> dict:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, tensors, "optimizer"))
    safetensors_io.write(folder / "state.safetensors", tensors, tensors.items())
    back: dict = unpack(json.loads(text), safetensors_io.read_all(folder / "state.safetensors"))
    return back


@pytest.mark.parametrize(
    "name",
    [
        *OPTIMIZERS,
        *("torch.optim.NAdam", "torch.optim.RAdam", "torch.optim.Adagrad", "torch.optim.Muon"),
        *("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.RMSprop8bit", "bitsandbytes.optim.Adagrad"),
    ],
)
def test_six_steps_are_three_a_save_and_three_more(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, lora_plus=4.0)
    whole = adapted()
    optimizer = make_optimizer(whole.named_parameters(), *settings)
    expected = list(learn(whole, optimizer, 6))

    first = adapted()
    optimizer = make_optimizer(first.named_parameters(), *settings)
    losses = list(learn(first, optimizer, 3))
    state = through_files(optimizer.state_dict(), tmp_path)
    second = adapted()
    second.load_state_dict(first.state_dict())
    optimizer = make_optimizer(second.named_parameters(), *settings)
    optimizer.load_state_dict(state)
    losses += learn(second, optimizer, 3)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def one_step(
    name: str, config: OptimizerConfig, shape: tuple[int, ...] = (4, 4), decay: float = 0.0, gradient: float = 1.0
) -> Tensor:
    """What the first step, at a rate of 0.1, does to ones."""
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer([(name, parameter)], config, TrainConfig(weight_decay=decay))
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["factor"]
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return parameter.detach() - 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_b_learns_faster_than_a_by_the_ratio_of_lora_plus(name: str) -> None:
    config = OptimizerConfig(name=name, lora_plus=2.0)
    torch.testing.assert_close(one_step("x.lora_b", config), 2 * one_step("x.lora_a", config))


def test_named_layers_learn_at_other_rates() -> None:
    config = OptimizerConfig(lora_plus=2.0, rate_pattern={"mlp.down": 0.5, r"blocks\.1\..*": 3.0})
    names = ["blocks.0.mlp.down.lora_a", "blocks.1.attn.key.lora_b", "blocks.0.attn.key.lora_b"]
    groups = make_optimizer(
        [(name, nn.Parameter(torch.ones(2, 2))) for name in names], config, TrainConfig()
    ).param_groups
    assert [group["factor"] for group in groups] == [0.5, 6.0, 2.0]
    with pytest.raises(UsageError, match=r"optimizer\.rate_pattern: mlp\.up matches no trained layer"):
        make_optimizer(
            [(names[0], nn.Parameter(torch.ones(2)))], OptimizerConfig(rate_pattern={"mlp.up": 2}), TrainConfig()
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_decay_and_vectors_do_not(name: str) -> None:
    config = OptimizerConfig(name=name)
    assert (one_step("x.lora_a", config, (4, 4), decay=0.5, gradient=0.0) < 0).all()
    assert (one_step("x.lora_a", config, (16,), decay=0.5, gradient=0.0) == 0).all()


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "bitsandbytes.optim.AdamW32bit"])
def test_steps_of_bitsandbytes_wait_for_the_device_only_with_paged_state(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Tensor] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 8192)) for _ in range(2))
    idle = nn.Parameter(torch.ones(4))
    optimizer: Any = make_optimizer([("x", ours), ("y", idle)], OptimizerConfig(name=name), TrainConfig())
    paged: Any = make_optimizer([("x", theirs), ("y", idle)], OptimizerConfig(name=name), TrainConfig())
    for step in range(4):
        paged.is_paged = step > 0  # with state that is there; a CPU makes no paged one
        for each, parameter in ((optimizer, ours), (paged, theirs)):
            waits.clear()
            parameter.grad = torch.sin(torch.arange(8192.0) + step)
            each.step()
            assert bool(waits) == (step == 0 or each is paged)  # the first step makes state
    assert torch.equal(ours, theirs)


def test_decay_in_adam_is_part_of_the_gradient() -> None:
    """With a gradient of -0.5 a decay of 0.5 on ones leaves nothing to do."""
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = make_optimizer([("a", parameter)], OptimizerConfig(name="adam"), TrainConfig(weight_decay=0.5))
    parameter.grad = torch.full_like(parameter, -0.5)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 4))


def test_settings_reach_the_optimizer() -> None:
    def group(**settings: Any) -> dict[str, Any]:
        parameters = [("a", nn.Parameter(torch.ones(2, 2)))]
        return make_optimizer(parameters, OptimizerConfig(**settings), TrainConfig(learning_rate=7e-5)).param_groups[0]

    assert group(name="sgd")["momentum"] == 0.9
    sgd = group(name="sgd", momentum=0.5, nesterov=True)
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"]) == (7e-5, 0.5, True)
    adam = group(name="adamw8bit", betas=(0.8, 0.9), eps=1e-5)
    assert (adam["lr"], tuple(adam["betas"]), adam["eps"]) == (7e-5, (0.8, 0.9), 1e-5)
    assert group(name="adadelta", options={"rho": 0.7})["rho"] == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd", "betas": (0.9, 0.99)}, r"optimizer.betas would have no effect: sgd has no such setting"),
        ({"name": "adamw", "momentum": 0.9, "nesterov": True}, "optimizer.momentum, optimizer.nesterov would have no"),
        ({"name": "lion", "eps": 1e-8}, "optimizer.eps would have no effect"),
        ({"name": "adadelta", "options": {"roh": 0.9}}, "optimizer.options: roh would have no effect"),
        ({"name": "torch.optim.Rprop"}, r"train.weight_decay would have no effect(.|\n)*Set --train.weight_decay 0"),
        ({"name": "torch.optim.Nope"}, "there is no optimizer torch.optim.Nope"),
        ({"name": "bitsandbytes.optim.GlobalOptimManager"}, "there is no optimizer bitsandbytes.optim.GlobalOptim"),
        # What fails when it is used, with the reason:
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "ValueError: Nesterov momentum requires a momentum"),
        ({"name": "bitsandbytes.optim.SGD8bit"}, "first steps .cpu.(.|\n)*SGD without momentum is not supported"),
        ({"name": "bitsandbytes.optim.AdEMAMix32bit"}, "first steps .cpu.(.|\n)*RuntimeError: output with shape"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused_before_weights_are_loaded(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_state_bytes(OptimizerConfig(**settings), TrainConfig(), CPU)


def test_a_rehearsal_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    measure_state_bytes(OptimizerConfig(), TrainConfig(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw", 8), ("sgd", 4), ("rmsprop", 4), ("adafactor", 0.25), ("adamw8bit", 2), ("lion8bit", 1), ("lion", 4)],
)
def test_the_plan_knows_the_size_of_the_state(name: str, size: float) -> None:
    assert measure_state_bytes(OptimizerConfig(name=name), TrainConfig(), CPU) == pytest.approx(size, rel=0.03)


def test_every_optimizer_with_a_short_name_runs_here() -> None:
    for name in OPTIMIZERS:
        measure_state_bytes(OptimizerConfig(name=name), TrainConfig(), CPU, vectors=True)
