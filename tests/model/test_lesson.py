"""Learning from a teacher: the divergence and its gradient against float64, and the loss of a model."""

import pytest
import torch
from torch import Tensor

from lit_qlora.model.gpt import IGNORE
from lit_qlora.model.lesson import Lesson, divergence
from tests.conftest import tiny_model

VOCAB = 12


def known(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of a teacher, and their log-probabilities behind which that of the others stands."""
    log_probs = (teacher / temperature).log_softmax(1)
    best, ids = log_probs.topk(k)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return ids.int(), torch.cat((best, rest), 1)


def by_hand(logits: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """The divergence over K + 1 outcomes from probabilities alone."""
    p, q = ((x / temperature).softmax(1) for x in (teacher, logits))
    ids = teacher.topk(k).indices
    p, q = ((torch.cat((x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)), 1)) for x in (p, q))
    return (p * (p / q).log()).sum(1)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, VOCAB, dtype=torch.float64, requires_grad=True), torch.randn(5, VOCAB, dtype=torch.float64)


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 2.5), (VOCAB - 1, 0.7)])
def test_the_divergence_is_that_of_the_known_tokens_and_all_others_as_one(
    pair: tuple[Tensor, Tensor], k: int, temperature: float
) -> None:
    logits, teacher = pair
    found = divergence(logits, *known(teacher, k, temperature), temperature)
    wanted = by_hand(logits, teacher, k, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (one,), (other,) = (torch.autograd.grad(x.sum(), logits) for x in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_with_every_token_known_it_is_the_divergence_of_the_whole_distributions(pair: tuple[Tensor, Tensor]) -> None:
    logits, teacher = pair
    found = divergence(logits, *known(teacher, VOCAB, 2.0), 2.0)
    p, q = ((x / 2.0).log_softmax(1) for x in (teacher, logits))
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (one,), (other,) = (torch.autograd.grad(x.sum(), logits) for x in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_loss_of_a_model_mixes_divergence_and_cross_entropy_of_labelled_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, teacher = tiny_model(0), tiny_model(1)
    model.hits = torch.zeros((), dtype=torch.int64)
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(3))
    labels, weights = tokens.roll(-1, 1), torch.linspace(0.1, 1, 18).view(2, 9)
    labels[:, -3:] = IGNORE
    ids, log_probs = known(teacher(tokens).flatten(0, 1).detach(), 320, 2.0)
    lesson = Lesson(ids.view(2, 9, -1), log_probs.view(2, 9, -1), 0.3, 2.0, torch.zeros(2))
    found = model.loss(tokens, labels, weights, lesson=lesson)
    log_probs_of = [(m(tokens) / t).log_softmax(-1) for m, t in ((model, 1.0), (model, 2.0), (teacher, 2.0))]
    kept = weights * (labels >= 0)
    entropy = -log_probs_of[0].gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    apart = (log_probs_of[2].exp() * (log_probs_of[2] - log_probs_of[1])).sum(-1)
    wanted = ((0.7 * entropy + 0.3 * 4 * apart) * kept).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    sums = torch.stack([(each * kept).sum() for each in (entropy, apart)]).detach()
    torch.testing.assert_close(lesson.sums, sums, rtol=1e-5, atol=1e-5)
    right = (log_probs_of[0].argmax(-1) == labels).sum()
    assert model.hits == right

    whole = torch.autograd.grad(found, model.head.weight)[0]
    monkeypatch.setattr("lit_qlora.model.gpt.LOGITS_AT_ONCE", 5 * 320)  # three slices
    sliced = torch.autograd.grad(model.loss(tokens, labels, weights, lesson=lesson), model.head.weight)[0]
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-6)
