"""On a GPU in bf16, what a teacher teaches and what a head reads is no farther from float64 than on the plain path."""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.fused import fuse, why_not
from lit_qlora.lora.score import add_score
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.model.lesson import Lesson
from tests.gpu.test_fused_gpu import adapted, errors, in_float64
from tests.model.test_lesson import known

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, LENGTH = 3, 96


def texts() -> tuple[Tensor, Tensor]:
    """Ids and labels on the host, as the loop has them."""
    tokens = torch.randint(1, 1024, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[:, :40] = IGNORE
    return tokens[:, :-1].contiguous(), labels


def taught(model: GPT) -> Tensor:
    """The loss of a lesson."""
    tokens, labels = texts()
    teacher = torch.randn(ROWS * LENGTH, 1024, generator=torch.Generator().manual_seed(1))
    ids, log_probs = (part.view(ROWS, LENGTH, -1) for part in known(teacher, 32, 2.0))
    return model.loss(tokens, labels, lesson=Lesson(ids, log_probs, 0.5, 2.0, torch.zeros(2, device="cuda")))


def labelled(model: GPT) -> Tensor:
    """The loss of a label behind each text."""
    tokens, labels = texts()
    labels[:, :-1] = IGNORE
    return nn.functional.cross_entropy(model.scores(tokens, labels), torch.arange(ROWS, device="cuda"))


def learn(model: GPT, loss_of: Callable[[GPT], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_of", [taught, labelled])
def test_the_fast_path_is_as_exact_as_the_plain_path(loss_of: Callable[[GPT], Tensor]) -> None:
    model = adapted()
    if loss_of is labelled:
        add_score(model, ROWS)
    exact_loss, exact = learn(in_float64(model), loss_of)
    plain_loss, plain = learn(model, loss_of)
    assert why_not(model) == ""
    fuse(model)
    loss, fast = learn(model, loss_of)
    assert fast.keys() == exact.keys()
    assert abs(float(loss - exact_loss)) < max(0.01 * abs(float(exact_loss)), 2 * abs(float(plain_loss - exact_loss)))
    assert statistics.median(errors(fast, exact)) < 1.3 * statistics.median(errors(plain, exact))
