"""Each loss of preferences is its paper's formula, has its gradient, and is the number that TRL computes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.errors import UsageError
from lit_qlora.settings import PUBLISHED, PreferenceConfig
from lit_qlora.train.preference_losses import FORMULAS, Pairs, kto

BY_TRL = json.loads((Path(__file__).parent / "trl_preference_values.json").read_text())
"""Values of TRL 1.16 for four pairs, with the meaning of each; see its "about"."""
NAMES = {"sigmoid": "dpo", "sigmoid_norm": "dpo", "sigmoid + 0.5 sft (RPO)": "dpo", "cpo sigmoid": "cpo"}


def how_of(case: dict[str, Any]) -> PreferenceConfig:
    """The settings here that are those of a case of TRL."""
    settings, kind = case["settings"], case["loss_type"]
    given = {name: settings[name] for name in ("label_smoothing", "ld_alpha") if name in settings}
    if kind == "sft":
        return PreferenceConfig(loss="sft")
    if "simpo_gamma" in settings:
        given["gamma"] = settings["simpo_gamma"]
    if "cpo_alpha" in settings or "loss_weights" in settings:
        given["sft_weight"] = settings.get("cpo_alpha", settings.get("loss_weights", [0, 0])[-1])
    if kind == "orpo":
        given["sft_prompts"] = True
    if kind == "sigmoid_norm":
        given["length_normalized"] = True
    return PreferenceConfig(loss=NAMES.get(kind, kind), beta=settings["beta"], **given)


def pairs_by_trl() -> Pairs:
    def column(name: str) -> Tensor:
        return torch.tensor([pair[name] for pair in BY_TRL["pairs"]], dtype=torch.float64)

    names = ("chosen_logp", "rejected_logp", "chosen_ref_logp", "rejected_ref_logp")
    return Pairs(*map(column, (*names, "chosen_answer_tokens", "rejected_answer_tokens")))


def sft_by_trl(kind: str) -> float:
    """The mean loss of the tokens of the chosen answers; ORPO counts the prompts, too."""
    pairs = BY_TRL["pairs"]
    if kind == "orpo":
        return -sum(p["chosen_logp_with_prompt"] for p in pairs) / sum(len(p["chosen_ids"]) - 1 for p in pairs)
    return -sum(p["chosen_logp"] for p in pairs) / sum(p["chosen_answer_tokens"] for p in pairs)


OF_ANSWERS = [case for case in BY_TRL["cases"] if "ld_alpha" not in case["settings"]]
"""The cases that log-probabilities of whole answers are enough for."""


@pytest.mark.parametrize("case", OF_ANSWERS, ids=lambda case: f"{case['loss_type']} {case['settings']}")
def test_losses_of_log_probabilities_are_those_of_trl(case: dict[str, Any]) -> None:
    how = how_of(case)
    loss = FORMULAS[how.loss](pairs_by_trl(), how).mean() + how.or_published("sft_weight") * sft_by_trl(how.loss)
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-6)


PAIR = (-3.0, -5.0, -4.0, -4.5, 6.0, 2.0)
"""Log-probabilities of a pair, the same before training, and tokens."""


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


IN_WORDS: dict[str, tuple[dict[str, Any], float]] = {
    "dpo": ({}, -math.log(logistic(0.1 * (1.0 + 0.5)))),
    "dpo smoothed": (
        {"label_smoothing": 0.2, "beta": 2.0},
        -0.8 * math.log(logistic(3.0)) - 0.2 * math.log(logistic(-3.0)),
    ),
    "dpo by token": ({"length_normalized": True, "beta": 2.0}, -math.log(logistic(2.0 * (1.0 / 6 + 0.5 / 2)))),
    "robust": ({}, (-0.9 * math.log(logistic(0.15)) + 0.1 * math.log(logistic(-0.15))) / 0.8),
    "hinge": ({}, 1 - 0.15),
    "ipo": ({}, (1.0 / 6 + 0.5 / 2 - 5.0) ** 2),
    "apo_zero": ({}, 1 - logistic(0.1) + logistic(-0.05)),
    "orpo": ({}, -0.1 * math.log(logistic(log_odds(-0.5) - log_odds(-2.5)))),
    "simpo": ({}, -math.log(logistic(2.0 * (-0.5 + 2.5) - 0.5))),
    "cpo": ({}, -math.log(logistic(0.1 * 2.0))),
    "sft": ({}, 0.0),
    "reward": ({}, -math.log(logistic(-3.0 + 5.0))),
}


@pytest.mark.parametrize("name", IN_WORDS)
def test_the_loss_of_a_pair_is_the_formula_of_its_paper(name: str) -> None:
    given, expected = IN_WORDS[name]
    how = PreferenceConfig(loss=name.split()[0], **given)  # type: ignore[arg-type]
    pair = Pairs(*(torch.tensor([value], dtype=torch.float64) for value in PAIR))
    torch.testing.assert_close(FORMULAS[how.loss](pair, how), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_of_a_loss_is_that_of_its_value(name: str) -> None:
    how = PreferenceConfig(loss=name)  # type: ignore[arg-type]
    torch.manual_seed(0)
    mine, before = (-4 * torch.rand(2, 5, dtype=torch.float64) - 0.1 for _ in range(2))
    tokens = torch.randint(1, 9, (2, 5)).double()

    def loss(log_probs: Tensor) -> Tensor:
        return FORMULAS[how.loss](Pairs(*log_probs, *before, *tokens), how)

    assert torch.autograd.gradcheck(loss, (mine.requires_grad_(),))


def test_the_gradient_of_dpo_weighs_a_pair_by_how_wrongly_it_is_ranked() -> None:
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in PAIR[:2])
    rest = (torch.tensor([x], dtype=torch.float64) for x in PAIR[2:])
    FORMULAS["dpo"](Pairs(chosen, rejected, *rest), PreferenceConfig()).backward()
    expected = 0.1 * logistic(-0.15)  # Rafailov et al. 2023, section 4
    assert chosen.grad
    assert rejected.grad
    assert chosen.grad.item() == pytest.approx(-expected)
    assert rejected.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [name for name, facts in PUBLISHED.items() if facts.margins])
def test_a_margin_asks_for_that_much_more_of_the_difference_of_rewards(loss: Any) -> None:
    how = PreferenceConfig(loss=loss, beta=1.0 if PUBLISHED[loss].beta else None)
    pair = Pairs(*(torch.tensor([value], dtype=torch.float64) for value in PAIR))
    tokens = pair.chosen_tokens if loss == "simpo" else 1.0
    less = pair._replace(chosen=pair.chosen - 0.25 * tokens)
    with_margin = FORMULAS[how.loss](pair._replace(margin=0.25), how)
    torch.testing.assert_close(with_margin, FORMULAS[how.loss](less, how))


def kto_in_words(gained: float, good: bool, drift: float, beta: float) -> float:
    return 1 - logistic(beta * (gained - drift) if good else beta * (drift - gained))


def test_kto_is_the_formula_of_its_paper_and_has_its_gradient() -> None:
    how = PreferenceConfig(loss="kto", desirable_weight=1.5)
    gained = torch.tensor([0.7, -2.0], dtype=torch.float64, requires_grad=True)
    good, drift = torch.tensor([True, False]), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = [1.5 * kto_in_words(0.7, True, 0.3, 0.1), kto_in_words(-2.0, False, 0.3, 0.1)]
    torch.testing.assert_close(kto(gained, good, drift, how).tolist(), expected)
    of_gained: Callable[[Tensor], Tensor] = lambda x: kto(x, good, drift, how)  # noqa: E731
    assert torch.autograd.gradcheck(of_gained, (gained,))
    kto(gained, good, drift, how).sum().backward()
    assert drift.grad is None


def test_an_answer_that_is_certain_has_a_finite_odds_ratio() -> None:
    certain = torch.zeros(1, requires_grad=True)
    other = torch.tensor([-2.0])
    loss = FORMULAS["orpo"](Pairs(certain, other, other, other, *torch.ones(2, 1)), PreferenceConfig(loss="orpo"))
    loss.backward()
    assert loss.isfinite()
    assert certain.grad is not None
    assert certain.grad.isfinite()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "sft", "beta": 0.1}, "beta"),
        ({"loss": "dpo", "gamma": 0.5}, "gamma"),
        ({"loss": "simpo", "ld_alpha": 0.5}, "ld_alpha"),
        ({"loss": "ipo", "length_normalized": True}, "length_normalized"),
        ({"loss": "dpo", "desirable_weight": 2.0}, "desirable_weight"),
        ({"loss": "kto", "sft_weight": 0.5}, "sft_weight"),
    ],
)
def test_a_setting_that_a_loss_does_not_read_is_refused_by_name(given: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=f"preference.{name}"):
        PreferenceConfig(**given)
