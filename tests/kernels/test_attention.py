"""Capped scores and heads of 512 give the attention of float64, for documents end to end and windows."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_qlora.kernels import launch
from lit_qlora.kernels.attention import LARGE, Scores, attend, attend_backward
from lit_qlora.kernels.dropout import NONE, Dropout, pair_factor_reference
from lit_qlora.kernels.launch import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: dict[str, tuple[list[int], int, int, int, float | None, int | None, float]] = {
    # ends of documents, query heads, key heads, features, cap, window, dropout
    "capped": ([0, 70], 2, 2, 16, 5.0, None, 0.0),
    "grouped, in a window": ([0, 75], 4, 2, 24, 5.0, 9, 0.0),
    "packed, with an empty document": ([0, 3, 70, 70, 101], 2, 1, 16, 5.0, None, 0.0),
    "packed, in a window": ([0, 66, 81], 2, 1, 16, 5.0, 67, 0.0),
    "large heads": ([0, 37], 1, 1, 160, 5.0, 20, 0.0),
    "no cap": ([0, 20, 30], 2, 1, 16, None, None, 0.0),
    "heads of 512": ([0, 10, 80], 2, 1, 512, None, None, 0.0),
    "heads of 512, in a window": ([0, 70], 1, 1, 512, 5.0, 9, 0.0),
    "packed, in a window, with dropout": ([0, 66, 81], 4, 2, 16, None, 67, 0.3),
    "heads of 512, capped, with dropout": ([0, 70], 1, 1, 512, 5.0, None, 0.5),
    "heads of 272, packed": ([0, 3, 40, 40, 60], 2, 1, 272, None, None, 0.0),
}


def meaning(q: Tensor, k: Tensor, v: Tensor, ends: list[int], scores: Scores, sinks: Tensor | None = None) -> Tensor:
    """The plain path's attention, document by document, with all scores in memory, and what the kernels drop."""
    outs = []
    for first, end in pairwise(ends):
        mask = torch.ones(end - first, end - first, dtype=torch.bool).tril()
        mask = mask if scores.window is None else mask.triu(1 - scores.window)
        products = torch.einsum("thd,shd->hts", q[first:end], k[first:end].repeat_interleave(q.size(1) // k.size(1), 1))
        products = products * scores.scale
        products = products if scores.cap is None else scores.cap * torch.tanh(products / scores.cap)
        products = products.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            products = torch.cat((products, sinks[:, None, None].expand(-1, end - first, 1)), dim=-1)
        weights = products.softmax(-1)[..., : end - first]
        if scores.dropout.p:
            rows = torch.arange(q.size(1))[:, None] * len(q) + torch.arange(first, end)
            factors = pair_factor_reference(rows.flatten(), torch.arange(end - first), scores.dropout)
            weights = weights * factors.view_as(weights)
        values = v[first:end].repeat_interleave(q.size(1) // v.size(1), 1)
        outs.append(torch.einsum("hts,shd->thd", weights, values))
    return torch.cat(outs)


def test_weights_are_kept_with_their_probability_and_each_by_itself() -> None:
    drawn = pair_factor_reference(torch.arange(300), torch.arange(300), Dropout(0.3, torch.tensor([5]))) * 0.7
    assert set(drawn.unique().tolist()) == {0.0, float(drawn.max())}
    kept = (drawn > 0).double()
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.005)
    for one in (kept, kept.T):  # neither rows nor columns know of each other
        apart = torch.corrcoef(one) - torch.eye(300, dtype=torch.float64)
        assert float(apart.abs().max()) < 0.3
        assert float(apart.mean().abs()) < 0.002


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, heads, keys, size, cap, window, p = CASES[case]
    if size > LARGE:
        monkeypatch.setattr(launch, "WITHOUT_CARD", 2**20)  # the blocks of 16 bit, in float32
    dropout = Dropout(p, torch.tensor([123]), -7) if p else NONE
    scores = Scores(1.5 * size**-0.5, cap, window, dropout)
    torch.manual_seed(0)
    stacked = 2 * torch.randn(ends[-1], heads + 2 * keys, size, dtype=torch.float64)
    q, k, v = (part.clone().requires_grad_() for part in stacked.split((heads, keys, keys), dim=1))
    exact, d_out = meaning(q, k, v, ends, scores), torch.randn(ends[-1], heads, size, dtype=torch.float64)
    gradients = torch.autograd.grad(exact, (q, k, v), d_out)

    scores = replace(scores, dropout=replace(dropout, seed=None if dropout.seed is None else dropout.seed.to(DEVICE)))
    own = stacked.float().to(DEVICE).split((heads, keys, keys), dim=1)  # views, with strides between tokens
    documents, longest = torch.tensor(ends, dtype=torch.int32, device=DEVICE), 128
    out, log_sum = attend(*own, scores, documents, longest)
    back = attend_backward(d_out.float().to(DEVICE), *own, out, log_sum, scores, documents, longest)
    for ours, theirs in zip((out, *back), (exact, *gradients), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=1e-4, atol=5e-5)
