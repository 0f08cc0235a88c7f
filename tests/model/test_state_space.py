"""State spaces: chunks compute what one token after another computes, and no document meets another."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lit_qlora.model.delta_net import CHUNK
from lit_qlora.model.state_space import NormOfGroups, state_rule, state_step

LENGTH = 2 * CHUNK + 23
ENDS = [0, 9, CHUNK, CHUNK + 30, LENGTH - 4, LENGTH]


def inputs() -> list[Tensor]:
    """Queries, keys, values and logarithms of what is kept."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, 3, size, dtype=torch.float64) for size in (5, 5, 7))
    return [q, k, v, -torch.rand(2, LENGTH, 3, dtype=torch.float64)]


def token_by_token(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same one after another."""
    state, out = torch.zeros(2, 3, 5, 7, dtype=torch.float64), []
    for i in range(LENGTH):
        y, state = state_step(*(part[:, i : i + 1] for part in parts), None, state)
        out.append(y)
    return torch.cat(out, dim=1), state


def test_chunks_compute_what_one_token_after_another_does_with_the_same_gradients() -> None:
    parts = [part.requires_grad_() for part in inputs()]
    weight = torch.randn(2, LENGTH, 3, 7, dtype=torch.float64)
    ours, reference = state_rule(*parts, None), token_by_token(parts)
    for got, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients, expected = (torch.autograd.grad((y * weight).sum(), parts) for y, _ in (ours, reference))
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [1, CHUNK, CHUNK + 9])
def test_a_text_can_be_read_in_pieces(first: int) -> None:
    parts = inputs()
    whole, behind = state_rule(*parts, None)
    begun, state = state_rule(*(part[:, :first] for part in parts), None)
    rest, state = state_rule(*(part[:, first:] for part in parts), None, state)
    torch.testing.assert_close(torch.cat((begun, rest), dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, behind, rtol=1e-12, atol=1e-12)


def test_documents_in_a_row_compute_what_each_computes_alone() -> None:
    parts, lengths = inputs(), torch.tensor(ENDS).diff()
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).expand(2, -1)
    packed, _ = state_rule(*parts, documents)
    alone = [state_rule(*(p[:, a:b] for p in parts), None)[0] for a, b in pairwise(ENDS)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_each_group_of_features_is_normed_by_itself() -> None:
    x, norm = torch.randn(3, 12), NormOfGroups(2, 12, 1e-6)
    assert torch.equal(norm(x)[:, :6], torch.nn.functional.rms_norm(x[:, :6], (6,), eps=1e-6))
