"""A head that reads labels on the fast path: the outputs and gradients of the plain path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.fused import fuse
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.score import add_score
from lit_qlora.model.gpt import IGNORE
from tests.fused.test_fused import adapted_model, assert_equal, batch

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, so for the interpreter"),
]


def packed() -> dict[str, Tensor]:
    """Two rows of two texts each, and padding behind those of the second."""
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 5 + [-1] * 3], dtype=torch.int32)
    positions = torch.tensor([[*range(5), *range(7)], [*range(4), *range(5), 0, 0, 0]])
    return {"positions": positions, "segments": segments}


def shared() -> dict[str, Tensor]:
    """A beginning of four tokens in each row, and two endings that do not see each other."""
    seen_until = torch.tensor([12] * 4 + [8] * 4 + [12] * 4).expand(2, 12)
    positions = torch.tensor([*range(4), *range(4, 8), *range(4, 8)]).expand(2, 12)
    segments = torch.tensor([0] * 8 + [1] * 4, dtype=torch.int32).expand(2, 12)
    return {"positions": positions, "segments": segments, "seen_until": seen_until}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (packed, {"scheme": "bnb.nf4"}),
        pytest.param(shared, {}, marks=pytest.mark.slow),
        pytest.param(dict, {"recompute": "full", "logit_multiplier": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_scores_and_gradients_are_those_of_the_plain_path(layout: Any, changes: dict[str, Any]) -> None:
    policy = changes.pop("recompute", "none")
    tokens, labels = batch()
    labels = labels.masked_fill(torch.arange(12) % 4 != 3, IGNORE)
    found, evaluated = [], []
    for fast in (False, True):
        model = adapted_model(**changes)
        add_score(model, 3)
        assert model.score is not None
        nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(4))
        if fast:
            fuse(model).set_recompute([policy] * len(model.blocks))
        scores = model.scores(tokens, labels, **layout())
        nn.functional.cross_entropy(scores, torch.arange(len(scores)) % 3).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert "score.weight" in gradients
        found.append((scores.detach(), gradients))
        with torch.no_grad():
            evaluated.append(model.eval().scores(tokens, labels, **layout()))
    assert_equal(*found)
    torch.testing.assert_close(*evaluated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evaluated[0], found[0][0], rtol=1e-4, atol=1e-4)
