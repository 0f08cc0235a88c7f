"""Learning from a teacher on the fast path: the loss and gradients of the plain path."""

from typing import Any

import pytest
import torch

from lit_qlora.fused import fuse
from lit_qlora.fused.lesson import divergence_gradient
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.attention import softcap
from lit_qlora.model.lesson import Lesson, divergence
from tests.fused.test_fused import adapted_model, assert_equal, batch
from tests.model.test_lesson import known

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, so for the interpreter"),
]


@pytest.mark.parametrize(("k", "cap"), [(3, None), (3, 2.0), (16, None)])
def test_the_gradient_of_the_divergence_is_that_of_autograd(k: int, cap: float | None) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    ids, log_probs = known(teacher, k, 1.5)
    wanted = divergence(softcap(logits, cap), ids, log_probs, 1.5)
    gradient, found = divergence_gradient(logits.detach(), Lesson(ids, log_probs, 1.0, 1.5, torch.zeros(2)), cap)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), logits)[0])


@pytest.mark.parametrize(
    "changes", [{"logit_softcap": 3.0}, pytest.param({"scheme": "bnb.nf4-dq"}, marks=pytest.mark.slow)]
)
def test_loss_and_gradients_are_those_of_the_plain_path(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.fused.head.head_tokens", lambda vocab: 7)  # several slices
    torch.manual_seed(5)
    teacher = torch.randn(24, 160)
    ids, log_probs = (x.view(2, 12, -1) for x in known(teacher, 6, 2.0))
    tokens, labels = batch()
    weights, found, sums, hits = torch.rand(2, 12), [], [], []
    for fast in (False, True):
        model = adapted_model(**changes)
        model.hits = torch.zeros((), dtype=torch.int64)
        if fast:
            fuse(model)
        lesson = Lesson(ids, log_probs, 0.6, 2.0, torch.zeros(2))
        loss = model.loss(tokens, labels, weights, lesson=lesson)
        (loss / 7).backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        sums.append(lesson.sums)
        hits.append(int(model.hits))
    assert_equal(*found)
    torch.testing.assert_close(*sums)
    assert hits[0] == hits[1]
