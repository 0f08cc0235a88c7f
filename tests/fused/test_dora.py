"""DoRA on the fast path: the same loss and gradients as on the plain one, of the rows' lengths too."""

from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.errors import UsageError
from lit_qlora.fused import fuse, why_not
from lit_qlora.fused.dora import Gains
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import Stack
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, TrainConfig
from tests.conftest import tiny_config
from tests.fused.test_experts import packed
from tests.fused.test_fused import LATENT, adapted_model, assert_equal, batch, gradients
from tests.fused.test_graphs import with_graphs
from tests.fused.test_per_layer import LENT, OWN

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
SLOW = pytest.mark.slow
BIASES = {"qkv_bias": True, "projection_bias": True, "mlp_bias": True}
CASES: dict[str, dict[str, Any]] = {
    "nf4, biases": BIASES | {"n_layer": 1, "scheme": "bnb.nf4", "attention_scale": 2.0},
    "16 bit, norms behind": {"n_layer": 1, "norm_position": "both"},
    "query and value of int8": {"targets": ("query", "value"), "scheme": "bnb.int8"},
    "mlp, parallel": {"targets": ("mlp",), "parallel_residual": True, "shared_norm": True, "norm": "layer"},
    "ranks that differ": {"lora": {"rank_pattern": {"key": 2, "up": 8}, "alpha_pattern": {"value": 1.0}}},
    "rank 80": {"r": 80, "scheme": "bnb.nf4"},
    "norms of heads, gates": {"qk_norm": "head", "attention_gate": True, "scheme": "bnb.nf4-dq"},
    "clipped": {"clip_qkv": 0.5},
    "latent attention": LATENT,
    "own embeddings, shared keys": OWN | LENT | {"n_layer": 3, "ffn_size": 64},
    "no MLP gate": {"ffn": "gelu", "n_layer": 1},
    "last block": {"lora": {"last_layers": 1}, "scheme": "bnb.nf4"},
    "cached": {"scheme": "bnb.nf4"},
}


def model_of(**changes: Any) -> GPT:
    """A model whose rows have other lengths than at the beginning, and none that is lost beside its bias."""
    model = adapted_model(**changes | {"lora": {"dora": True} | changes.get("lora", {})})
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.magnitude is not None:
            length = module.magnitude.data
            length.copy_(length.sign() * (length.abs() + 0.05) * (1 + 0.2 * torch.rand_like(length)))
    return model


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        ("nf4, biases", "none"),
        ("16 bit, norms behind", "full"),
        *(pytest.param(case, policy, marks=SLOW) for case in CASES for policy in ("none", "mlp", "attn", "full")),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_path(case: str, policy: Any) -> None:
    model = model_of(**CASES[case])
    expected = gradients(model, *batch())
    assert any(name.endswith("magnitude") for name in expected[1])
    assert why_not(model) == ""
    fused = fuse(model, cached_blocks=int(case == "cached"))
    fused.set_recompute([policy] * len(fused.blocks))
    for _ in range(2):  # the second pass finds what the first one left
        assert_equal(gradients(model, *batch()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nf4, biases", "latent attention"])
def test_packed_rows_with_dropout_change_no_bit_when_they_are_recomputed(case: str) -> None:
    model = model_of(**CASES[case] | {"dropout": 0.2})
    fused, results = fuse(model), []
    for policy in ("none", "attn", "full"):
        fused.set_recompute([policy] * len(fused.blocks))  # type: ignore[list-item]
        torch.manual_seed(3)
        results.append(gradients(model, *packed()))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient, found[name]) for name, gradient in results[0][1].items())


@pytest.mark.slow
def test_steps_and_graphs_are_those_of_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    arguments, curves = [part.cpu() for part in batch(1, 32)], []
    for fast in (False, True):
        model = model_of(n_layer=1, scheme="bnb.nf4")
        recording = with_graphs(model)[1] if fast else None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(5):
            loss, _ = gradients(model, *arguments)
            losses.append(loss)
            optimizer.step()
        curves.append(torch.stack(losses))
        assert recording is None or recording.replayed > 0
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_the_lengths_of_rows_are_those_of_the_sum_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(32, 24, bias=False, dtype=torch.float64), LoRAConfig(r=4, alpha=8, dora=True)).double()
    nn.init.normal_(layer.lora_b)
    gains = Gains([layer], Stack((24,), (0,), 4), torch.device("cpu"))
    gains.factors = gains.factors.double()
    weight = layer.base.weight.detach()  # type: ignore[union-attr]
    gains.squares = weight.square().sum(1)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    gains.refresh(weight, layer.scale * layer.lora_a.detach(), layer.lora_b.detach().double())
    exact = (weight + layer.scale * layer.lora_b.detach() @ layer.lora_a.detach()).norm(dim=1)
    assert layer.magnitude is not None
    torch.testing.assert_close(gains.factors[:, 0], layer.magnitude.detach() / exact, rtol=1e-13, atol=0)


def test_a_row_of_zeros_learns_on_the_plain_path_alone() -> None:
    model = model_of(n_layer=1)
    layer = model.blocks[0].attn.query
    with torch.no_grad():
        layer.base.weight[5] = 0
        layer.lora_b.zero_()
        layer.magnitude.copy_(layer.row_norms())
    assert why_not(model) == "DoRA on weights with a row of zeros"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        loss, found = gradients(model, *batch())
        assert loss.isfinite()
        optimizer.step()
    assert found["blocks.0.attn.query.magnitude"][5] != 0
    assert layer.magnitude[5] > 1e-3


def test_weights_in_fp8_are_refused() -> None:
    lora, train = LoRAConfig(dora=True), TrainConfig(fp8=True)
    with pytest.raises(UsageError, match=r"train\.fp8: DoRA"):
        make_plan(tiny_config(n_embd=256), lora, Storage(torch.bfloat16), MicroBatches(64), train, Room(80e9))
