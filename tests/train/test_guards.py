"""What the guards let pass and what they stop."""

import math

import pytest
import torch
from torch import nn

from lit_qlora.errors import NumericalError
from lit_qlora.lora.layer import add_lora
from lit_qlora.settings import GuardConfig, LoRAConfig
from lit_qlora.train.guards import Guard, check_first_gradients
from tests.conftest import tiny_model


def losses(*values: float, **settings: float) -> int:
    """How many of these losses pass."""
    guard = Guard(GuardConfig(**settings))
    for count, value in enumerate(values):
        try:
            guard.check_loss(count + 1, value)
        except NumericalError:
            return count
    return len(values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_passes(value: float) -> None:
    assert losses(2.0, value, 2.0, divergence=0) == 1


def test_a_loss_far_above_its_best_for_long_enough_does_not_pass() -> None:
    assert losses(*[2.0] * 6, *[6.5] * 10, patience=10) == 15
    assert losses(*[2.0] * 6, *[6.5] * 10, patience=11) == 16
    assert losses(*[2.0] * 6, *[5.5] * 10, patience=3) == 16  # less than three times as much
    assert losses(*[2.0] * 6, *[6.5] * 10, divergence=0) == 16


def test_single_peaks_pass() -> None:
    assert losses(*[2.0] * 6, *[50.0, 50.0, 2.0] * 5, patience=3) == 21


def test_a_small_loss_may_be_many_times_a_smaller_one() -> None:
    assert losses(*[0.001] * 20, *[0.5] * 30, patience=3) == 50


def test_a_rough_beginning_passes() -> None:
    assert losses(1.0, 9.0, 9.0, 9.0, patience=2) == 4


def test_a_guard_that_is_shown_the_steps_again_is_the_same() -> None:
    values = [3.0, 2.5, 2.2, 2.1, 2.0, 2.0, 9.0, 9.0]
    norms = [1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan, math.inf]
    first, again = Guard(GuardConfig()), Guard(GuardConfig())
    for value, norm in zip(values, norms, strict=True):
        first.check_loss(1, value)
        may_update = first.may_update(1, norm)
        again.recall(value, skipped=not may_update)
    assert first.skipped == 2
    assert vars(first) == vars(again)


@pytest.mark.parametrize(("scaled", "passes"), [(False, 2), (True, 19)])
def test_updates_may_be_left_out_so_often_in_a_row(scaled: bool, passes: int) -> None:
    guard = Guard(GuardConfig(skips=3), scaled)
    for _ in range(passes):
        assert not guard.may_update(1, math.inf)
    assert guard.may_update(1, 1.0)
    for _ in range(passes):
        assert not guard.may_update(1, math.nan)
    with pytest.raises(NumericalError, match=f"for {passes + 1} steps in a row, up to step 9"):
        guard.may_update(9, math.inf)


def test_a_layer_that_gets_no_gradient_is_named() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(dropout=0.0, targets=("all",)))
    tokens = torch.randint(1, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens).backward()
    learners = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    check_first_gradients(learners)
    idle = model.get_parameter("blocks.1.attn.value.lora_b")
    idle.grad = torch.zeros_like(idle)
    with pytest.raises(NumericalError, match=r"1 of 14 layers got no gradient .*: blocks\.1\.attn\.value\."):
        check_first_gradients(learners)


def test_an_expert_that_no_token_chose_is_let_off() -> None:
    weight = nn.Parameter(torch.ones(2))
    check_first_gradients([("blocks.0.mlp.experts.3.gate.lora_b", weight)])
    with pytest.raises(NumericalError):
        check_first_gradients([("blocks.0.mlp.gate.lora_b", weight)])
