"""Blocks with experts learn on the fast path what they learn on the plain one: every router, adapter and storage."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_qlora.fused import Fused, fuse, why_not
from lit_qlora.fused.experts import ExpertGroup
from lit_qlora.fused.passes import Backward
from lit_qlora.kernels.dropout import Dropout, factor_reference
from lit_qlora.kernels.experts import (
    Choices,
    choose_backward_reference,
    choose_reference,
    combine_reference,
    sort_reference,
)
from lit_qlora.kernels.experts_dequantize import dequantize
from lit_qlora.kernels.experts_lora import gradient_reference, project_reference
from lit_qlora.kernels.experts_mlp import mlp_backward_reference
from lit_qlora.kernels.experts_products import gate_up_reference, product_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.norm import add_norm, norm_backward_reference, norm_reference
from lit_qlora.lora.layer import lora_state
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import SCHEMES, OptimizerConfig, TrainConfig
from lit_qlora.train.optim import make_optimizer
from lit_qlora.train.training_state import restore, state_files
from tests.fused.test_fused import adapted_model, assert_equal, batch, gradients
from tests.fused.test_graphs import with_graphs

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 48, "router_normalized": True}
SIGMOID = {"router": "sigmoid", "router_correction": True, "router_scale": 2.5}
LLAMA4 = {
    "router": "sigmoid",
    "router_before": True,
    "router_normalized": False,
    "n_expert_per_token": 1,
    "shared_expert_size": 64,
    "expert_size": 64,
    "no_rope_layers": (1,),
    "full_attention_layers": (1,),
    "sliding_window": 5,
    "chunked_window": True,
    "unrotated_scale_beta": 0.5,
    "unrotated_scale_size": 4,
    "qk_norm": "rotated",
    "qk_norm_after_rope": True,
    "rope_interleaved": True,
}
BESIDE = {"experts_beside": True, "router_norm": True, "norm_position": "both"}
CASES: dict[str, dict[str, Any]] = {
    "softmax over the chosen": {"router_scale": 1.5, "targets": ("all", "router")},
    "softmax over all": {"router_normalized": False, "scheme": "bnb.nf4", "expert_size": 64},
    "gpt-oss": {
        "ffn": "swiglu_clamped",
        "mlp_bias": True,
        "router": "softmax_chosen",
        "router_bias": True,
        "scheme": "bnb.nf4-dq",
        "expert_size": 192,
        "head_size": 64,
        "n_kv_head": 4,
        "ffn_size": 256,
    },
    "sigmoid, correction, groups, shared": {
        **SIGMOID,
        "targets": ("all", "router"),
        "router_groups": 2,
        "router_groups_kept": 1,
        "shared_expert_size": 48,
        "dense_layers": (0,),
    },
    "geglu, shared of nf4": {"ffn": "geglu_tanh", "shared_expert_size": 64, "scheme": "bnb.nf4", "expert_size": 64},
    "a storage for each stack": {
        "scheme": "bnb.int8",
        "expert_size": 64,
        "layers": {"blocks.0.mlp.experts.*.down": "none", "blocks.1.mlp.experts.*.(gate|up)": "bnb.nf4-dq"},
    },
    "tied": {"lora": {"tied": True}, "n_layer": 1},
    "tied, rank 80": {"lora": {"tied": True}, "n_layer": 1, "r": 80},
    "attention alone": {"targets": ("query", "value"), "scheme": "bnb.fp4", "expert_size": 64},
    "ranks of their own": {
        "lora": {"rank_pattern": {"experts.[0-9].(gate|up)": 2}, "alpha_pattern": {"experts.[0-9].down": 3.0}},
        "shared_expert_size": 48,
    },
    "rank 80": {"r": 80, "shared_expert_size": 48},
    "one expert, all experts": {"n_expert_per_token": 4},
    "Llama 4": LLAMA4 | {"scheme": "bnb.nf4-dq", "targets": ("all", "router")},
    "beside an MLP": BESIDE | {"scheme": "bnb.nf4", "expert_size": 64, "targets": ("all", "router")},
    "post norms": {"norm_position": "both", "parallel_residual": False},
    "parallel": {"parallel_residual": True, "shared_norm": True, "norm": "layer"},
}


def model_of(**changes: Any) -> GPT:
    return adapted_model(**EXPERTS | changes)


def with_idle(model: GPT, *arguments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, a zero one for an expert that no token came to."""
    loss, found = gradients(model, *arguments)
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss, {name: found.get(name, torch.zeros_like(p)) for name, p in learners.items()}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_equal(*((loss, {n: g for n, g in found.items() if other[1][n].any()}) for loss, found in (one, other)))
    assert not any(one[1][name].any() for name, gradient in other[1].items() if not gradient.any())


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == "Llama 4" else c for c in CASES])
def test_loss_and_gradients_are_those_of_the_plain_path(case: str) -> None:
    model = model_of(**CASES[case])
    expected = with_idle(model, *batch())
    assert why_not(model) == ""
    fuse(model)
    assert_same(with_idle(model, *batch()), expected)


def test_biases_of_experts_that_read_weighted_tokens_take_the_plain_path() -> None:
    assert why_not(model_of(router_before=True, mlp_bias=True)) == "biases of experts that read weighted tokens"


def test_experts_of_different_storage_take_the_plain_path() -> None:
    model = model_of(expert_size=64, layers={"experts.2.down": "bnb.int8"})
    assert why_not(model) == "experts of different storage"


def packed() -> tuple[Tensor | None, ...]:
    """Two documents and padding in a row."""
    tokens, labels = batch(rows=1, length=16)
    lengths = torch.tensor([5, 7, 4])
    labels[:, 12:] = IGNORE
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    return tokens, labels, None, positions, torch.tensor([0, 1, -1]).repeat_interleave(lengths)[None]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES)
def test_every_storage_holds_in_packed_rows_recomputed_cached_and_released(case: str, scheme: Any) -> None:
    shared = {"shared_expert_size": 64} if "shared_expert_size" in CASES[case] else {}
    model = model_of(**CASES[case] | shared | {"ffn_size": 128, "expert_size": 64, "n_layer": 2, "scheme": scheme})
    expected = with_idle(model, *packed())
    assert why_not(model) == ""
    fused, quantized = fuse(model, cached_blocks=1), scheme != "none" or "layers" in CASES[case]
    loss, found = with_idle(model, *packed())
    assert_same((loss, found), expected)
    for policies in (["mlp", "full"], ["attn", "none"]):
        fused.set_recompute(policies)  # type: ignore[arg-type]
        assert all(torch.equal(gradient, found[name]) for name, gradient in with_idle(model, *packed())[1].items())
    assert model.can_release == quantized
    assert model.release() == quantized
    assert all(torch.equal(gradient, found[name]) for name, gradient in with_idle(model, *packed())[1].items())


@pytest.mark.parametrize("adapted", [("gate",), ("up",), ("down",), ("up", "down"), ("gate", "down")])
def test_any_of_the_layers_of_experts_may_have_adapters(adapted: tuple[str, ...]) -> None:
    model = model_of(n_layer=1, scheme="bnb.nf4", expert_size=64)
    for expert in model.blocks[0].mlp.experts:
        for name in {"gate", "up", "down"}.difference(adapted):
            setattr(expert, name, getattr(expert, name).base)
    expected = with_idle(model, *batch())
    assert why_not(model) == ""
    fuse(model)
    assert_same(with_idle(model, *batch()), expected)


def test_experts_may_have_adapters_of_other_ranks_and_scales_or_none() -> None:
    patterns = {"rank_pattern": {r"experts\.1\.gate": 2}, "alpha_pattern": {"up": 3.0, r"experts\.3\.down": 4.0}}
    model = model_of(n_layer=1, lora=patterns)
    expert = model.blocks[0].mlp.experts[2]
    expert.up, expert.down = expert.up.base, expert.down.base
    expected = with_idle(model, *batch())
    fused = fuse(model)
    assert_same(with_idle(model, *batch()), expected)
    assert not fused.flatten(lambda _: None)


def test_frozen_experts_are_not_given_their_input_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(targets=("query", "key", "value", "projection"), scheme="bnb.nf4", expert_size=64)
    expected, normed = with_idle(model, *batch()), []
    fuse(model)
    monkeypatch.setattr("lit_qlora.fused.experts.add_norm", lambda *of: normed.append(of) or add_norm(*of))
    assert_same(with_idle(model, *batch()), expected)
    assert len(normed) == len(model.blocks)


def layer_of(scheme: Any) -> nn.Module:
    linear = nn.Linear(64, 64, bias=False)
    return linear if scheme == "none" else QuantizedLinear(linear.weight.detach(), None, scheme)


@pytest.mark.parametrize(("scheme", "name"), [("none", "weight"), ("bnb.nf4-dq", "packed"), ("bnb.int8", "absmax")])
def test_the_layers_keep_views_of_the_stacked_weights(scheme: Any, name: str) -> None:
    experts = [[layer_of(scheme), layer_of(scheme)] for _ in range(3)]
    layers = [layer for expert in experts for layer in expert]
    before = [getattr(layer, name).clone() for layer in layers]
    for _ in range(2):
        ExpertGroup(experts, torch.float32)
        parts = [getattr(layer, name) for layer in layers]
        assert all(torch.equal(*pair) for pair in zip(parts, before, strict=True))
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mlp", "attn", "full"])
@pytest.mark.parametrize("changes", [SIGMOID, LLAMA4, BESIDE], ids=["sigmoid", "Llama 4", "beside"])
def test_recomputing_changes_no_bit(changes: dict[str, Any], policy: Any) -> None:
    shared = {} if "experts_beside" in changes else {"shared_expert_size": 64}
    model = model_of(**{"scheme": "bnb.nf4", "expert_size": 64, "dropout": 0.3} | shared | changes)
    fused = fuse(model)
    results = []
    for policies in (["none", "none"], [policy, policy]):
        fused.set_recompute(policies)
        torch.manual_seed(3)
        results.append(with_idle(model, *batch()))
    (loss, expected), (other, found) = results
    assert torch.equal(loss, other)
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items())


def test_documents_in_a_row_see_only_themselves() -> None:
    model = model_of(n_layer=1)
    expected = with_idle(model, *packed())
    fuse(model)
    assert_same(with_idle(model, *packed()), expected)


class Masked(nn.Module):
    """Dropout of an expert's rows that drops what the fast path drops; `rows` are those of the expert."""

    def __init__(self, factor: Tensor, rows: slice) -> None:
        super().__init__()
        self.factor = factor[rows]

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) -> the same."""
        return x * self.factor


@pytest.mark.parametrize(("r", "before"), [(4, False), (80, False), (4, True)])
def test_dropout_is_that_of_the_plain_path_with_the_same_elements_dropped(r: int, before: bool) -> None:
    p = 0.3
    model = model_of(n_layer=1, targets=("mlp", "router"), r=r, dropout=p, router_before=before)
    torch.manual_seed(5)
    seed = torch.tensor([int(torch.randint(1, 2**31 - 1, ()))])
    moe, inputs = model.blocks[0].mlp, []
    own = {moe.router: moe.router.dropout}
    moe.router.dropout = Masked(factor_reference(24, 64, Dropout(p, seed, 9), "cpu"), slice(None))
    handle = moe.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.loss(*batch())
    handle.remove()
    _, chosen = moe.router(inputs[0].flatten(0, 1))
    ends = [0, *chosen.flatten().bincount(minlength=4).cumsum(0).tolist()]
    for e, expert in enumerate(moe.experts):
        for offset, width, names in ((2, 64, ("gate", "up")), (3, 48, ("down",))):
            factor = factor_reference(48, width, Dropout(p, seed, offset), "cpu")
            for name in names:
                layer = getattr(expert, name)
                own[layer], layer.dropout = layer.dropout, Masked(factor, slice(ends[e], ends[e + 1]))
    expected = with_idle(model, *batch())
    for layer, dropout in own.items():
        layer.dropout = dropout
    fuse(model)
    torch.manual_seed(5)
    assert_same(with_idle(model, *batch()), expected)


def steps(model: GPT, count: int = 2) -> list[Tensor]:
    """Losses and gradients of some steps, between which there are losses that nobody learns from."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: list[Tensor] = []
    for _ in range(count):
        loss, grads = with_idle(model, *batch())
        found += [loss, *grads.values()]
        optimizer.step()
        with torch.no_grad():
            found.append(model.loss(*batch()))
    return found


@pytest.mark.slow
def test_weights_that_are_dequantised_ahead_or_cached_give_the_same_bits() -> None:
    ends = []
    for cached, ahead in ((0, False), (0, True), (1, True)):
        model = model_of(scheme="bnb.nf4", expert_size=64)
        fused = fuse(model, cached_blocks=cached, ahead=ahead)
        assert len(fused.ahead) == 2 * ahead
        ends.append(steps(model))
    for other in ends[1:]:
        assert all(torch.equal(*pair) for pair in zip(ends[0], other, strict=True))


@pytest.mark.slow
def test_what_is_ahead_saves_a_dequantisation_of_the_first_and_of_the_last_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, done = model_of(n_layer=3, scheme="bnb.nf4", expert_size=64), []
    fuse(model)
    monkeypatch.setattr(
        "lit_qlora.fused.stacked.dequantize", lambda weight, out: done.append(weight) or dequantize(weight, out)
    )
    for expected in (6 + 4, 4 + 4):  # two kinds in each of three blocks, forward and backward
        done.clear()
        with_idle(model, *batch())
        assert len(done) == expected


@pytest.mark.slow
def test_giving_back_changes_no_bit_and_frees_what_is_ahead() -> None:
    model = model_of(scheme="bnb.nf4", expert_size=64)
    fused = fuse(model, cached_blocks=1)
    before = with_idle(model, *batch())[1]
    assert model.can_release
    assert model.release()
    assert not model.can_release
    assert fused.sizes.peak(["none"] * 2, 24) < fuse(model_of(scheme="bnb.nf4")).sizes.peak(["none"] * 2, 24)
    assert all(torch.equal(gradient, before[name]) for name, gradient in with_idle(model, *batch())[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("lowest", [0, 1])
def test_graphs_of_experts_give_what_passes_without_a_graph_give(lowest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = model_of(scheme="bnb.nf4", expert_size=64, n_layer=3, lora={"last_layers": 3 - lowest})
    arguments = [part.cpu() for part in batch(1, 32)]
    expected = with_idle(model, *arguments)
    _, recording = with_graphs(model)
    for _ in range(4):
        assert_same(with_idle(model, *arguments), expected)
        with torch.no_grad():
            model.loss(*batch())  # leaves the last block's weights in the buffers
    assert recording.replayed > 0


def test_a_capture_counts_no_choice_of_an_expert_and_a_replay_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = model_of(n_layer=1, targets=("query",))
    _, recording = with_graphs(model)
    router = model.blocks[0].mlp.router
    router.taken = torch.zeros(4, dtype=torch.int64)
    for _ in range(3):
        gradients(model, *(part.cpu() for part in batch(1, 32)))
    assert recording.replayed == 4
    assert router.taken.sum() == 3 * 32 * 2


@pytest.mark.slow
def test_two_tensors_of_all_adapters_learn_what_the_adapters_do() -> None:
    ends = []
    for flat in (False, True):
        model = model_of(n_layer=1)
        fused = fuse(model)
        flatten = fused.flatten if flat else None
        config, train = OptimizerConfig(name="sgd"), TrainConfig(learning_rate=0.1)
        optimizer = make_optimizer(model.named_parameters(), config, train, flatten=flatten)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == (2 if flat else 2 * (4 + 3 * 4))
        for _ in range(2):
            for _ in range(2):  # micro-batches, whose gradients add up
                (model.loss(*batch()) / 7).backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
        model.loss(*batch()).backward()
        model.zero_grad()  # a step that is done again, as when memory has run out
        model.loss(*batch()).backward()
        optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_tensors_of_adapters_end_where_learning_rates_change() -> None:
    model = model_of(n_layer=2)
    config = OptimizerConfig(rate_pattern={"experts.[0-9].(gate|up|down)": 0.5}, lora_plus=2.0)
    optimizer = make_optimizer(model.named_parameters(), config, TrainConfig(), flatten=fuse(model).flatten)
    found = {group["factor"]: [p.numel() for p in group["params"]] for group in optimizer.param_groups}
    # A and B of attention and of experts, in two blocks; A of the one and B of the other learn equally fast.
    assert {factor: len(sizes) for factor, sizes in found.items()} == {1.0: 4, 0.5: 2, 2.0: 2}
    for factor, ends in {0.5: ".lora_a", 1.0: ".lora_b"}.items():
        experts = [p.numel() for name, p in model.named_parameters() if ".experts." in name and name.endswith(ends)]
        rest = [p.numel() for name, p in model.named_parameters() if name.endswith("lora_a") and "experts" not in name]
        assert sum(found[factor]) == sum(experts) + (sum(rest) if factor == 1.0 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_run_that_goes_on_from_its_saved_state_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    def begin() -> tuple[GPT, torch.optim.Optimizer]:
        model = model_of(n_layer=1, scheme="bnb.nf4", expert_size=64, r=16)
        config, train = OptimizerConfig(name=name), TrainConfig(learning_rate=0.01)
        return model, make_optimizer(model.named_parameters(), config, train, flatten=fuse(model).flatten)

    def learn(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
        for step in steps:
            model.loss(*batch(1, 5 + step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, second = begin(), begin(), begin()
    learn(*whole, range(3))
    learn(*first, range(2))
    for file, write in state_files(fabric, *first, {"step": 2}).items():
        write(tmp_path / file)
    restore(fabric, *second, tmp_path)
    learn(*second, range(2, 3))
    ends = [lora_state(model) for model, _ in (whole, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_steps_are_those_of_the_plain_path() -> None:
    curves = []
    for fast in (False, True):
        model = model_of(n_layer=1, scheme="bnb.nf4", expert_size=64)
        flatten = fuse(model).flatten if fast else None
        train = TrainConfig(learning_rate=0.01)
        optimizer = make_optimizer(model.named_parameters(), OptimizerConfig(), train, flatten=flatten)
        losses = []
        for step in range(200):
            loss = model.loss(*batch(1, 6 + step % 4))  # four texts that come again and again
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(losses))
    assert curves[0][-4:].sum() < 0.2 * curves[0][:4].sum()
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=2e-2)


def sort_slowly(weights: Tensor, chosen: Tensor, experts: int, taken: Tensor | None, counts: Tensor | None) -> Choices:
    """The choices sorted by the reference, without tables of tiles, which references do not read."""
    position, token, weight, ends = sort_reference(weights, chosen, experts)
    none = ends[:0]
    return Choices(chosen, weights, position, token, weight, F.pad(ends, (1, 0)), none, none, 1, 1, 0, 0)


def at_once(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference of a kernel whose sums can be added up later."""
    return lambda *given, folds, **named: reference(*given, **named)


REFERENCES = {
    "add_gradient": at_once(gradient_reference),
    "add_norm": lambda x, y, norm, out: (x, out.copy_(norm_reference(x, norm))),
    "choose": lambda scores, k, scale, counts=None: choose_reference(scores, k, scale),
    "choose_backward": lambda choices, d_weights, scale, _: choose_backward_reference(choices, d_weights, scale),
    "combine": lambda y, choices, more=None: combine_reference(y, choices, more),
    "gate_up": gate_up_reference,
    "mlp_backward": lambda *given, folds=None, **named: mlp_backward_reference(*given, **named),
    "norm_backward": lambda d, x, norm, _: norm_backward_reference(d, x, norm, None),
    "of_tokens": lambda parts, choices: parts.sum(0)[choices.position.long()],
    "product": product_reference,
    "project": project_reference,
    "sort": sort_slowly,
}
"""What the kernels mean, under the names that lit_qlora.fused.experts calls them by, or in OF_ROUTING its router."""
OF_ROUTING = ("add_norm", "choose", "choose_backward", "norm_backward", "sort")
IN_FLOAT64: dict[str, dict[str, Any]] = {
    "shared scale": {"router_scale": 2.5},
    "gpt-oss": CASES["gpt-oss"] | {"scheme": "none"},
    "sigmoid, groups": {**SIGMOID, "router_groups": 2, "router_groups_kept": 1},
    "rank 80": {"r": 80},
    "tied": {"lora": {"tied": True}},
    "tied, rank 80": {"lora": {"tied": True}, "r": 80},
    "one expert of four": {"n_expert_per_token": 1, "router": "sigmoid"},
    "router that norms the stream": {"router_norm": True, "router_scale": 2.5},
    "router that norms the stream, softmax over all": {"router_norm": True, "router_normalized": False},
    "weighted inputs": {"router_before": True},
    "weighted inputs, rank 80": {"router_before": True, "router": "sigmoid", "r": 80},
}


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("case", IN_FLOAT64)
def test_the_algorithm_is_exact_in_float64(case: str, saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' references, against autograd through the plain mixture."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the router's own precision
    for name, reference in REFERENCES.items():
        module = "routing" if name in OF_ROUTING else "experts"
        monkeypatch.setattr(f"lit_qlora.fused.{module}.{name}", reference)
    model = model_of(n_layer=1, targets=("mlp", "router"), **IN_FLOAT64[case]).double()
    moe = model.blocks[0].mlp
    x, d_y = torch.randn(2, 20, 64, dtype=torch.float64).unbind()
    stream = torch.randn(20, 64, dtype=torch.float64)
    leaf, routed = x.clone().requires_grad_(), stream.clone().requires_grad_() if model.config.router_norm else None
    y = moe(leaf[None], None if routed is None else routed[None])[0]
    y.backward(d_y)
    learners = {name: p for name, p in moe.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learners.items()}
    fused = Fused(model)
    experts = fused.blocks[0].mlp.experts
    run = fused._pass(torch.zeros(1, 20, dtype=torch.int64), None, None)[1]
    fused.copies[0].refresh()
    fused.gradient.zero_()
    read = None if routed is None else stream
    out, saved = experts.forward(x, None, run, saves, read)
    dx, d_routed = experts.backward(d_y, x, saved, Backward(run, fused.pending, run.workspaces), routed=read)
    streams = [] if routed is None else [(d_routed, routed.grad)]
    found = {
        name: gradient for name, p in learners.items() for q, gradient in (*fused.every_a, *fused.every_b) if q is p
    }
    for actual, wanted in [(out, y), (dx, leaf.grad), *streams, *((found[name], expected[name]) for name in expected)]:
        # The weight of one chosen expert is 1, so routers have no gradient.
        assert float((actual - wanted).detach().norm()) <= 1e-12 * max(1e-3, float(wanted.detach().norm()))
