"""Which tokens the head reads."""

import pytest
import torch

from lit_qlora.fused.head import Labelled
from lit_qlora.model.gpt import IGNORE


@pytest.mark.parametrize(("tokens", "unlabelled", "gathers"), [(512, 4, False), (512, 5, True), (127, 1, True)])
def test_tokens_are_gathered_unless_nearly_all_have_a_label(tokens: int, unlabelled: int, gathers: bool) -> None:
    labels, weights = torch.arange(tokens), torch.rand(tokens)
    labels[1 : 1 + unlabelled] = IGNORE
    labelled = Labelled.of(labels.view(1, -1), weights.view(1, -1))
    own = labels >= 0 if gathers else torch.full((tokens,), True)
    assert (labelled.indices is not None) == gathers
    assert torch.equal(labelled.labels, labels[own])
    assert labelled.weights is not None
    assert torch.equal(labelled.weights, weights[own])


def test_labelled_tokens_are_brought_to_a_multiple() -> None:
    labels = torch.full((64,), IGNORE)
    labels[40:53] = 7
    labelled = Labelled.of(labels, None, step=16)
    assert labelled.indices is not None
    assert labelled.indices.tolist() == [*range(40, 53), 0, 1, 2]
    assert labelled.labels.tolist() == [7] * 13 + [IGNORE] * 3
