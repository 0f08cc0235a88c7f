"""Dropout inside the model on a GPU in bf16: as near to float64 as the plain path that drops the same elements."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.model.gpt import GPT
from tests.fused.test_hidden_dropout import P, as_the_fast_path_drops
from tests.gpu.test_fused_gpu import (
    LAYOUTS,
    adapted,
    assert_recomputing_changes_no_bit,
    errors,
    gradients,
    in_float64,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "windows, heads of 128": {"sliding_window": 48, "head_size": 128},
    "sinks": {"attention_sinks": True},
    "capped scores, heads of 256": {"attention_softcap": 5.0, "head_size": 256},
}


def dropping(**changes: Any) -> GPT:
    model = adapted(**changes)
    model.set_dropout(P)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_errors_are_no_larger_than_those_of_the_plain_path(
    kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_qlora.fused import fuse, why_not

    model = dropping(**MODELS[kind])
    assert why_not(model) == ""
    exact_model, plain_model = in_float64(model), copy.deepcopy(model)
    fuse(model)
    ratios: list[float] = []
    for number in range(2):
        torch.manual_seed(number)
        arguments = LAYOUTS[layout]()
        tokens, positions = arguments[0], arguments[3] if len(arguments) > 3 else None
        column = torch.arange(tokens.size(1), device="cuda")
        begins = torch.zeros_like(tokens) if positions is None else column - positions
        torch.manual_seed(5)
        seed = torch.tensor([int(torch.randint(1, 2**31 - 1, ()))])
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for one in (exact_model, plain_model):
            with monkeypatch.context() as patched:
                as_the_fast_path_drops(patched, seed, model.config.n_layer, begins)
                found.append(gradients(one, *arguments))
        torch.manual_seed(5)
        loss, fast = gradients(model, *arguments)
        (exact_loss, exact), (_, plain) = found
        ours, theirs = errors(fast, exact), errors(plain, exact)
        assert max(ours) < 2 * max(theirs)
        assert abs(loss - exact_loss) < 2e-3 * exact_loss
        ratios += [a / b for a, b in zip(ours, theirs, strict=True)]
    assert statistics.geometric_mean(ratios) < 1, statistics.geometric_mean(ratios)


@pytest.mark.parametrize("layout", ["cudnn", "packed"])
@pytest.mark.parametrize("policy", ["attn", "offload", "full", "full-offload"])
def test_recomputing_and_offloading_drop_the_same_elements(policy: Any, layout: str) -> None:
    from lit_qlora.fused import fuse

    model = dropping(dropout=0.1)
    assert_recomputing_changes_no_bit(model, fuse(model), LAYOUTS[layout](), policy)
