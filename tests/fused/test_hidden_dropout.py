"""Dropout inside the model: the fast path drops at the plain path's places, the same elements however it recomputes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import fuse, why_not
from lit_qlora.kernels.dropout import Dropout, factor_reference, pair_factor_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.gpt import GPT
from tests.fused.test_experts import BESIDE, EXPERTS, packed, with_idle
from tests.fused.test_fused import LATENT, adapted_model, assert_equal, batch, gradients
from tests.fused.test_graphs import with_graphs
from tests.fused.test_per_layer import LENT, OWN

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
P = 0.3
SLOW = pytest.mark.slow
CASES: dict[str, dict[str, Any]] = {
    "llama": {"n_layer": 1, "scheme": "bnb.nf4", "dropout": 0.2},
    "norms behind, embeddings that learn": {
        "n_layer": 1,
        "norm_position": "both",
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "lora": {"train_tokens": (3, 7, 159)},
    },
    "two blocks, windows": {"sliding_window": 6, "full_attention_layers": (1,)},
    "parallel": {"parallel_residual": True, "shared_norm": True, "norm": "layer"},
    "capped": {"attention_softcap": 5.0},
    "sinks": {"attention_sinks": True, "n_kv_head": 4},
    "latent attention": LATENT,
    "experts beside an MLP": EXPERTS | BESIDE,
    "own embeddings, shared keys": OWN
    | LENT
    | {"n_layer": 3, "lora": {"train_embeddings": True}, "embedding_multiplier": 3.0},
    "learned positions": {"positions": "learned", "n_kv_head": 4, "norm": "layer"},
}


def dropping(**changes: Any) -> GPT:
    model = adapted_model(**changes)
    model.set_dropout(P)
    return model


def as_the_fast_path_drops(monkeypatch: pytest.MonkeyPatch, seed: Tensor, layers: int, begins: Tensor) -> None:
    """Let the plain model drop the elements that the fast path drops with this seed.

    Args:
        begins: (B, T), the column in which the document of each token begins.
    """
    outputs = count()
    lookups = count()

    def drop(x: Tensor, p: float) -> Tensor:
        """At the embeddings first, then behind attention and MLP of each block."""
        assert p == P
        block, which = divmod(next(outputs) + 1, 2) if layers else (0, 0)
        place = 0 if block == 0 else 3 * (block - 1) + 2 + which
        rows, drawn = x.flatten(0, 1), Dropout(P, seed.to(x.device), -1 - place)
        return (x * factor_reference(*rows.shape, drawn, x.device).view_as(x)).to(x.dtype)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float | None = None,
        sinks: Tensor | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert dropout == P
        rows, heads, length, size = q.shape
        k, v = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (k, v))
        scores = q @ k.mT * (size**-0.5 if scale is None else scale)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if mask is None else mask
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(rows, heads, length, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :length]
        drawn = Dropout(P, seed.to(q.device), -1 - (1 + 3 * next(lookups)))
        factors = []
        for row in range(rows):
            tokens = torch.arange(length, device=q.device)
            own = torch.arange(heads, device=q.device)[:, None] * rows * length + row * length + tokens
            columns = tokens - begins[row]
            factors.append(pair_factor_reference(own.flatten(), columns, drawn).view(heads, length, length))
        return (weights * torch.stack(factors)).to(v.dtype) @ v

    monkeypatch.setattr("lit_qlora.model.gpt.drop", drop)
    monkeypatch.setattr("lit_qlora.model.attention.attend", attend)


def alone() -> tuple[Tensor | None, ...]:
    return batch()


@pytest.mark.parametrize(
    ("case", "layout", "policy"),
    [
        ("llama", alone, "none"),
        ("norms behind, embeddings that learn", alone, "full"),
        *(pytest.param(case, layout, "none", marks=SLOW) for case in CASES for layout in (alone, packed)),
        *(pytest.param(case, packed, "attn", marks=SLOW) for case in CASES),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_path_with_the_same_elements_dropped(
    case: str, layout: Callable[[], tuple[Tensor | None, ...]], policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = dropping(**CASES[case] | {"dropout": 0.0}), layout()
    torch.manual_seed(5)
    seed = torch.tensor([int(torch.randint(1, 2**31 - 1, ()))])
    tokens = arguments[0]
    assert tokens is not None
    begins = torch.zeros_like(tokens)
    if len(arguments) > 3 and arguments[3] is not None:
        begins = torch.arange(tokens.size(1)) - arguments[3]
    with monkeypatch.context() as patched:
        as_the_fast_path_drops(patched, seed, model.config.n_layer, begins)
        expected = with_idle(model, *arguments)
    assert why_not(model) == ""
    fused = fuse(model)
    fused.set_recompute([policy] * len(fused.blocks))
    torch.manual_seed(5)
    loss, found = with_idle(model, *arguments)
    busy = {name: gradient for name, gradient in expected[1].items() if gradient.any()}
    assert_equal((loss, {name: found[name] for name in busy}), (expected[0], busy))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_recomputing_drops_the_same_elements(case: str) -> None:
    model = dropping(**CASES[case])
    fused, results = fuse(model), []
    for policy in ("none", "attn", "full"):
        fused.set_recompute([policy] * len(fused.blocks))  # type: ignore[list-item]
        torch.manual_seed(3)
        results.append(gradients(model, *batch()))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient, found[name]) for name, gradient in results[0][1].items())


def test_nothing_is_dropped_where_the_model_does_not_train() -> None:
    model = adapted_model(n_layer=1)
    with torch.no_grad():
        expected = model.eval().loss(*batch())
        model.set_dropout(P)
        fuse(model.train())
        dropped = model.loss(*batch())
        torch.testing.assert_close(model.eval().loss(*batch()), expected)
    assert abs(dropped - expected) > 1e-3


@pytest.mark.slow
def test_a_replayed_graph_drops_other_elements_with_each_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = dropping(n_layer=1)
    arguments = [part.cpu() for part in batch(1, 32)]
    _, recording = with_graphs(model)
    losses = [float(torch.manual_seed(seed) and gradients(model, *arguments)[0]) for seed in (1, 2, 1, 2, 1, 2)]
    assert recording.replayed > 0
    assert losses[4:] == losses[2:4] == losses[:2]
    assert losses[0] != losses[1]


def test_large_heads_take_the_plain_path() -> None:
    model = dropping(n_layer=1, full_head_size=512, full_attention_layers=(0,), sliding_window=8)
    assert why_not(model) == "train.hidden_dropout with heads of more than 256 features"


def test_the_plan_has_a_gradient_more() -> None:
    from lit_qlora.fused import Fused

    model = dropping(n_layer=1)
    dropping_sizes = Fused(model).sizes
    for policy in ("none", "full"):
        quiet = replace(dropping_sizes, drops=False)
        assert dropping_sizes.peak([policy], 64) - quiet.peak([policy], 64) == 2 * 64 * model.config.n_embd  # type: ignore[list-item]
