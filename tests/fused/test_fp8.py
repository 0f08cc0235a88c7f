"""In FP8 the fast path rounds the operands of its products, and computes the same otherwise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.data import read_data
from lit_qlora.errors import UsageError
from lit_qlora.fused import fp8 as products
from lit_qlora.fused import fuse, why_not
from lit_qlora.fused.group import Group
from lit_qlora.kernels import fp8 as kernels
from lit_qlora.kernels.dequantize import write_b
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.quantize import Storage, frozen_weight, quantize_linears
from lit_qlora.run.banner import plan_run
from lit_qlora.run.learning import take_path
from lit_qlora.run.plan import MicroBatches, Plan, Room, make_plan
from lit_qlora.run.resume import Checkpoint, check_same_run, plain
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, Scheme, TrainConfig
from tests.conftest import tiny_config
from tests.fused.test_fused import CASES, DEVICE, POLICIES, adapted_model, assert_equal, batch, gradients
from tests.fused.test_per_layer import LENT, OWN

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]


def make_group(
    rows: tuple[int, ...], k: int, r: int, adapted: tuple[bool, ...], scheme: Scheme, bias: bool, dtype: torch.dtype
) -> Group:
    """Layers with so many outputs that multiply in FP8, some with adapters."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(k, n, bias=bias, device=DEVICE, dtype=dtype) for n in rows).requires_grad_(False)
    quantize_linears(layers, scheme)
    lora = LoRAConfig(r=max(r, 1), alpha=2.0, dropout=0.0)
    group = Group(
        [LoRALinear(base, lora) if learns else base for base, learns in zip(layers, adapted, strict=True)], dtype, True
    )
    if group.rank:
        group.a = torch.randn(group.rank, k, device=DEVICE, dtype=dtype)
        group.b = torch.randn(group.stack.adapted_rows, r, device=DEVICE, dtype=dtype)
    return group


def in_float64(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """W as FP8 holds it over its scales, the scales (N, 1), and B as it would stand beside W."""
    assert group.fp8 is not None
    plain = torch.zeros(group.n, group.width, device=DEVICE, dtype=group.dtype)
    if group.b is not None:
        write_b(group.b, plain, group.stack)
    w8 = torch.empty(group.n, group.k, device=DEVICE, dtype=kernels.FP8)
    kernels.quantize_weights(group.fp8.weight, group.fp8.scale, w8, group.stack, group.table)
    return w8.double(), group.fp8.scale.double()[:, None], plain[:, group.k :].double()


def rows_as_rounded(x: Tensor) -> Tensor:
    """Rows as FP8 holds them, in float64."""
    scale = kernels.scales(x.abs().amax(1, keepdim=True))
    return (x.float() / scale).to(kernels.FP8).double() * scale.double()


def relative(actual: Tensor, expected: Tensor) -> float:
    """The error of a whole tensor; NaN where there is one."""
    return float((actual.double() - expected).norm() / expected.norm())


def errors_of_products(group: Group, tokens: int) -> dict[str, float]:
    """How far Y, dX and dZ are from what float64 makes of the same rounded operands."""
    torch.manual_seed(1)
    x = torch.randn(tokens, group.width, device=DEVICE).to(group.dtype)
    dy = (torch.randn(tokens, group.n, device=DEVICE) * 1e-5).to(group.dtype)
    workspace = torch.full((group.workspace_size,), float("nan"), device=DEVICE, dtype=group.dtype)
    w8, scale, b = in_float64(group)
    exact = rows_as_rounded(x[:, : group.k]) @ (w8 * scale).T + x[:, group.k :].double() @ b.T
    if group.bias is not None:
        exact = exact + group.bias.double()
    y = group.product(x, group.matrix(workspace))
    workspace.fill_(float("nan"))
    d_out = group.product_back(dy, workspace)
    assert y.dtype == d_out.dtype == group.dtype
    assert d_out.shape == (tokens, group.width)
    errors = {
        "y": relative(y, exact),
        "dx": relative(d_out[:, : group.k], rows_as_rounded(dy.float() * scale.T.float()) @ w8),
    }
    if group.rank:
        errors["dz"] = relative(d_out[:, group.k :], dy.double() @ b)
    return errors


GROUPS: dict[str, tuple[Any, ...]] = {
    "stacked": ((96, 32, 48), 64, 4, (True, False, True), "bnb.nf4", True),
    "no adapter": ((96, 32), 64, 4, (False, False), "bnb.fp4", False),
    "one, rank 3": ((48,), 80, 3, (True,), "none", False),
    "int8, rank 80": ((96, 32), 80, 80, (True, True), "bnb.int8", False),
    "double quantisation": ((256, 256), 64, 8, (False, True), "bnb.nf4-dq", False),
}


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("kind", GROUPS)
def test_products_are_those_of_the_rounded_operands(kind: str, tokens: int) -> None:
    errors = errors_of_products(make_group(*GROUPS[kind], torch.float32), tokens)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("kind", GROUPS)
def test_weights_in_fp8_take_no_more_room_than_those_in_16_bit(kind: str) -> None:
    group = make_group(*GROUPS[kind], torch.bfloat16)
    assert group.workspace_size <= group.n * group.width


SHORT = [("bnb.nf4", "attn")]
QUICK = ["nf4", "query and value", "biases", "last block"]
PER_LAYER = {"embeddings for each block": {"n_layer": 3, "scheme": "bnb.nf4", **OWN, **LENT}}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES | PER_LAYER]
)
def test_with_operands_that_are_not_rounded_it_is_the_plain_path(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the eight bits themselves: which product has which operands, scales, adapters and biases."""

    def product(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], dtype: torch.dtype, bias: Any = None) -> Tensor:
        y = (x[0] @ w[0].T) * x[1] * w[1]
        return y if bias is None else y + bias

    for module in (kernels, products):
        monkeypatch.setattr(module, "FP8", torch.float32)
        monkeypatch.setattr(module, "scaled_product", product)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    model = adapted_model(**(CASES | PER_LAYER)[case])
    expected = gradients(model, *batch())
    assert why_not(model) == ""
    fuse(model, fp8=True)
    assert_equal(gradients(model, *batch()), expected)


def test_rounding_costs_a_product_less_than_a_twentieth() -> None:
    """Operands have three bits of mantissa: an error of 2.6 % each, where rounding to nf4 has cost 9 % before."""
    group = make_group((128,), 512, 1, (False,), "none", False, torch.float32)
    x, dy = torch.randn(64, 512), torch.randn(64, 128)
    assert group.dense is not None
    w = group.dense.double()
    workspace = torch.empty(group.workspace_size)
    assert 0.02 < relative(group.product(x, group.matrix(workspace)), x.double() @ w.T) < 0.05
    assert 0.02 < relative(group.product_back(dy, workspace), dy.double() @ w) < 0.05


@pytest.mark.parametrize("scheme", [pytest.param("none", marks=pytest.mark.slow), "bnb.nf4"])
def test_loss_and_gradients_stay_close_to_those_of_16_bit(scheme: Scheme) -> None:
    model, other = adapted_model(scheme), adapted_model(scheme)
    loss, expected = gradients(model, *batch(2, 40))
    fuse(other, fp8=True)
    rounded, actual = gradients(other, *batch(2, 40))
    assert rounded != loss
    torch.testing.assert_close(rounded, loss, rtol=5e-3, atol=0)
    errors = {name: relative(actual[name], expected[name].double()) for name in expected}
    assert max(errors.values()) < 0.3, errors


@pytest.mark.parametrize(
    ("scheme", "policy"),
    [
        pytest.param(scheme, policy, marks=[] if (scheme, policy) in SHORT else pytest.mark.slow)
        for scheme in ("none", "bnb.nf4")
        for policy in POLICIES[1:]
    ],
)
def test_recomputing_changes_no_bit(policy: Any, scheme: Scheme) -> None:
    model = adapted_model(scheme, dropout=0.3)
    fused, results = fuse(model, fp8=True), []
    for policies in (["none", "none"], [policy, policy]):
        fused.set_recompute(policies)
        torch.manual_seed(3)
        results.append(gradients(model, *batch()))
    (loss, gradient), (again, other) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient[name], other[name]) for name in gradient)


def test_a_nan_in_a_frozen_weight_reaches_the_loss() -> None:
    model = adapted_model()
    frozen_weight(model.blocks[1].mlp.down.base)[3, 5] = float("nan")
    fuse(model, fp8=True)
    with torch.no_grad():
        assert not torch.isfinite(model.loss(*batch()))


def test_the_head_and_the_layers_themselves_are_not_changed() -> None:
    model, other = adapted_model(), adapted_model()
    fused = fuse(model, fp8=True)
    assert fused.head.group.fp8 is None
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    fused.model.fast = None
    assert_equal(gradients(model, *batch()), gradients(other, *batch()))


def test_workspaces_are_half_as_large_as_in_16_bit() -> None:
    spaces = {}
    for fp8 in (False, True):
        fused = fuse(adapted_model("bnb.nf4").to(torch.bfloat16), fp8=fp8)
        for policy in ("none", "full"):
            fused.set_recompute([policy] * 2)  # type: ignore[list-item]
            spaces[policy, fp8] = sum({t.data_ptr(): t.nbytes for t in fused.workspaces if t is not None}.values())
    assert spaces["none", True] <= 0.6 * spaces["none", False]
    assert spaces["full", True] == spaces["none", True]


def planned(quantize: Scheme, room: float | None = 2**30, **train: Any) -> Plan:
    return make_plan(
        tiny_config(),
        LoRAConfig(),
        Storage(torch.bfloat16, quantize),
        MicroBatches(64),
        TrainConfig(**train),
        Room(room),
    )


@pytest.mark.parametrize("policy", ["none", "attn", "full"])
def test_a_plan_counts_bytes_where_there_were_pairs_of_them(policy: Any) -> None:
    config = tiny_config()
    plan = planned("bnb.nf4", recompute=policy, fp8=True)
    other = planned("bnb.nf4", recompute=policy, keep_dequantized=0)  # else it needs no workspace
    assert plan.fp8
    assert not other.fp8
    wide = 2 * config.ffn_size  # a copy of the gradients of gate and up comes, half of their weights goes
    kept = 2 * 2 * config.n_embd * config.n_embd * 1.5 if policy == "full" else 0
    assert other.activations - plan.activations == wide * config.n_embd - 64 * wide + kept


@pytest.mark.parametrize(
    ("changes", "reason"), [({"fast": False}, "train.fast is false"), ({"room": None}, "needs a CUDA device")], ids=str
)
def test_it_is_refused_where_the_fast_path_is_not_taken(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"train.fp8 needs the fast path, .*{reason}"):
        planned("none", fp8=True, **changes)


def test_a_model_that_turns_out_to_need_the_plain_path_is_refused() -> None:
    """take_path would train in another precision than was asked for."""
    model = adapted_model(ffn="swiglu_clamped")
    with pytest.raises(UsageError, match="ffn 'swiglu_clamped'"):
        take_path(model, replace(planned("none"), fp8=True))


def test_a_gpu_without_fp8_is_refused(
    tiny_checkpoint: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.run.banner.gpu_bytes", lambda: 2**33)
    monkeypatch.setattr("lit_qlora.run.banner.weights_dtype", lambda precision: torch.bfloat16)
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", val_fraction=0.1)
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint, data=data, train=TrainConfig(fp8=True))
    read = read_data(config)
    with pytest.raises(UsageError, match=r"of compute capability 8\.9 or above"):
        plan_run(config, read)
    monkeypatch.setattr("lit_qlora.run.banner.has_fp8", lambda: True)
    assert plan_run(config, read).fp8


def test_a_run_does_not_go_on_in_another_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(checkpoint_dir=tiny_checkpoint)
    counters = {"base": {"sha256": content_hash(tiny_checkpoint)}, "config": plain(config), "data": {}}
    checkpoint = Checkpoint(tmp_path / "step-1", tmp_path / "step-1.state", counters)
    check_same_run(config, {}, "", checkpoint)
    with pytest.raises(UsageError, match=r"train\.fp8  False -> True"):
        check_same_run(replace(config, train=TrainConfig(fp8=True)), {}, "", checkpoint)
