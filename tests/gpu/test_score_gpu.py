"""On a GPU in bf16 scores are as near to float64's by the fast path as by the plain one, whatever shares a row."""

import copy
import random
from typing import Any

import pytest
import torch

from lit_qlora.evaluate.score import Request, Scorer
from lit_qlora.fused import reader
from lit_qlora.settings import Scheme
from tests.gpu.test_fused_gpu import adapted, in_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def requests() -> list[Request]:
    """Questions with four choices, questions after the same examples, and a whole text."""
    draw = random.Random(0)

    def ids(most: int) -> list[int]:
        return draw.choices(range(1024), k=draw.randint(1, most))

    asked: list[Request] = []
    for _ in range(40):
        context = ids(90)
        asked += [(context, ids(20)) for _ in range(4)]
    examples = draw.choices(range(1024), k=200)
    asked += [(examples + ids(60), [letter]) for _ in range(20) for letter in range(4)]
    return [*asked, ([1], draw.choices(range(1024), k=511))]


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4, "sliding_window": 48}], ids=["grouped queries", "window"])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_scores_are_no_farther_from_float64_than_one_by_one(scheme: Scheme, changes: dict[str, Any]) -> None:
    model, asked = adapted(scheme, **changes).eval(), requests()
    exact = torch.tensor([x for x, _ in Scorer(in_float64(model), 1).score(asked)], dtype=torch.float64)
    alone = Scorer(copy.deepcopy(model), 1)
    together, fast = Scorer(model), Scorer(model)
    fast.hidden = reader(model)
    assert fast.hidden != model.hidden
    errors = []
    for scorer in (alone, together, fast):
        scores = torch.tensor([x for x, _ in scorer.score(asked)], dtype=torch.float64)
        errors.append(float((scores - exact).abs().mean()))
    assert errors[1] <= 1.2 * errors[0] + 1e-3
    assert errors[2] <= 1.2 * errors[0] + 1e-3
    assert errors[0] <= 2e-2 * float(exact.abs().mean())
