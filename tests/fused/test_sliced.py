"""The MLP of a long row, a slice of tokens at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_qlora.fused import fuse, sliced
from lit_qlora.fused.memory import SLICE
from lit_qlora.fused.mlp import DenseMlp
from lit_qlora.fused.passes import Backward
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.settings import Recompute
from tests.fused.test_experts import BESIDE, EXPERTS
from tests.fused.test_fused import adapted_model, assert_equal, batch, gradients

pytestmark = pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="in float32, so for the interpreter")
SLOW = pytest.mark.slow


@pytest.fixture
def short_slices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let slices have at most seven tokens; the tokens of each call are listed."""
    asked: list[int] = []
    monkeypatch.setattr(sliced, "slice_tokens", lambda tokens: asked.append(tokens) or min(7, tokens))
    return asked


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("full", {"scheme": "bnb.nf4"}),
        pytest.param("mlp", {}, marks=SLOW),
        pytest.param("attn", {"targets": ("mlp",)}, marks=SLOW),
        pytest.param("full", {"r": 80}, marks=SLOW),
        pytest.param("full", {"norm": "layer", "ffn": "gelu", "mlp_bias": True}, marks=SLOW),
        pytest.param("full", {"norm_position": "both"}, marks=SLOW),
        pytest.param("full", {"parallel_residual": True}, marks=SLOW),
        pytest.param("full", {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32}, marks=SLOW),
        pytest.param("full", EXPERTS | BESIDE, marks=SLOW),
        pytest.param("attn", {"lora": {"dora": True}, "mlp_bias": True}, marks=SLOW),
    ],
    ids=str,
)
def test_a_step_in_slices_is_the_step_at_once(
    policy: Recompute, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    fused = fuse(adapted_model(**changes))
    fused.set_recompute([policy] * len(fused.blocks))
    at_once = gradients(fused.model, *batch())
    asked = request.getfixturevalue("short_slices")
    assert_equal(gradients(fused.model, *batch()), at_once)
    assert set(asked) == {24}


@pytest.mark.parametrize("keeps", [False, True])
def test_a_gradient_that_is_needed_no_more_gives_its_memory_to_the_next(keeps: bool) -> None:
    many = 2 * SLICE
    d_out = torch.ones(many, 1)
    run: Any = SimpleNamespace(seed=None)
    back = Backward(run, Pending(), (None, None, None))
    mlp: Any = SimpleNamespace(backward=lambda d_y, stream, saved, d_out, *_: 3 * d_y.pop() + d_out)
    found = sliced.backward(mlp, [d_out], [], [None, None], d_out, back, (), keeps)
    assert torch.equal(found, torch.full((many, 1), 4.0))
    assert (found is d_out) == (not keeps)
    assert torch.equal(d_out, torch.ones(many, 1)) == keeps


def test_each_slice_drops_elements_of_its_own_and_the_same_in_both_passes(
    short_slices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fuse(adapted_model(dropout=0.5, targets=("mlp",)))
    fused.set_recompute(["full"] * len(fused.blocks))
    seeds: dict[str, list[int]] = {"forward": [], "backward": []}
    for name, of_pass in (("forward", lambda *given: given[3]), ("backward", lambda *given: given[4].forward)):
        inner = getattr(DenseMlp, name)

        def watched(
            self: DenseMlp, *given: Any, name: str = name, inner: Any = inner, of: Any = of_pass, **more: Any
        ) -> Any:
            seeds[name].append(int(of(*given).seed))
            return inner(self, *given, **more)

        monkeypatch.setattr(DenseMlp, name, watched)
    gradients(fused.model, *batch())
    assert len(set(seeds["forward"])) == 4
    assert seeds["forward"] == seeds["backward"] == seeds["forward"][:4] * len(fused.blocks)
