"""Experts on a GPU in bf16: as near to float64 as the plain path, the same bits however weights come, no wait."""

import copy
from typing import Any

import pytest
import torch

from lit_qlora.lora.layer import lora_state
from lit_qlora.model.gpt import GPT, IGNORE
from tests.gpu.test_fused_gpu import (
    LAYOUTS,
    adapted,
    assert_as_near_as_plain,
    assert_recomputing_changes_no_bit,
    errors,
    gradients,
    in_float64,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXPERTS = {"n_expert": 16, "n_expert_per_token": 4, "expert_size": 192, "router_normalized": True}
ALL = {"n_expert": 4, "n_expert_per_token": 4}
"""Every expert is chosen: nearly tied ones change places in either path, which would outweigh all rounding."""
SIGMOID = {"router": "sigmoid", "router_correction": True, "router_scale": 2.5, "shared_expert_size": 192}
CLAMPED = {"ffn": "swiglu_clamped", "mlp_bias": True, "router": "softmax_chosen", "router_bias": True}
BESIDE = {"experts_beside": True, "router_norm": True, "norm_position": "both", "ffn": "geglu_tanh"}
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {**ALL},
    "nf4-dq, bf16 attention heads": {**ALL, "scheme": "bnb.nf4-dq", "n_embd": 512, "n_head": 8, "n_kv_head": 4},
    "int8, rank 64": {**ALL, "scheme": "bnb.int8", "r": 64},
    "bf16, rank 128": {**ALL, "scheme": "none", "r": 128},
    "gpt-oss's": {**ALL, **CLAMPED},
    "sigmoid, shared, dense block": {**ALL, **SIGMOID, "dense_layers": (0,)},
    "weighted inputs": {**ALL, "router_before": True, "scheme": "bnb.nf4-dq"},
    "beside an MLP": {**ALL, **BESIDE, "scheme": "bnb.nf4-dq"},
    "geglu, mlp only": {**ALL, "ffn": "geglu_tanh", "targets": ("mlp",)},
}


def model_of(**changes: Any) -> GPT:
    return adapted(**EXPERTS | changes)


@pytest.mark.parametrize("layout", ["cudnn", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_errors_are_no_larger_than_those_of_the_plain_path(kind: str, layout: str) -> None:
    assert_as_near_as_plain(model_of(**MODELS[kind]), layout)


def test_a_choice_of_experts_is_as_near_to_float64_as_on_the_plain_path() -> None:
    from lit_qlora.fused import fuse

    model = model_of()
    exact_model, plain_model = in_float64(model), copy.deepcopy(model)
    fuse(model)
    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(6):
        torch.manual_seed(seed)
        arguments = LAYOUTS["cudnn"]()
        exact = gradients(exact_model, *arguments)[1]
        zero = {name: torch.zeros_like(p) for name, p in lora_state(exact_model).items()}
        for found, of in ((ours, model), (theirs, plain_model)):
            got = zero | gradients(of, *arguments)[1]
            found.append(sum(float((got[n] - exact[n]).square().sum()) for n in exact))
    assert sum(ours) < 1.2 * sum(theirs), (ours, theirs)


@pytest.mark.parametrize("layout", ["cudnn", "packed"])
@pytest.mark.parametrize("policy", ["mlp", "attn", "offload", "full", "full-offload"])
def test_recomputing_and_offloading_change_no_bit(policy: Any, layout: str) -> None:
    from lit_qlora.fused import fuse

    model = model_of(dropout=0.1, **SIGMOID)
    assert_recomputing_changes_no_bit(model, fuse(model), LAYOUTS[layout](), policy)


def test_weights_ahead_and_cached_weights_change_no_bit() -> None:
    from lit_qlora.fused import fuse

    ends = []
    for cached, ahead in ((0, False), (0, True), (1, True), (3, True)):
        model = model_of(n_layer=3)
        fuse(model, cached_blocks=cached, ahead=ahead)
        found = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for seed in range(8):  # often enough for a race to show
            torch.manual_seed(seed)
            loss, gradient = gradients(model, *LAYOUTS["cudnn"]())
            found += [loss, *gradient.values()]
            optimizer.step()
        ends.append(found)
    for other in ends[1:]:
        assert all(torch.equal(*pair) for pair in zip(ends[0], other, strict=True))


def test_graphs_give_the_bits_of_passes_without_a_graph() -> None:
    from lit_qlora.fused import fuse
    from lit_qlora.fused.graphs import SIGHTINGS

    model = model_of(n_layer=3)
    fused = fuse(model, graph_tokens=512)
    arguments = [part.cpu() for part in LAYOUTS["cudnn"]()]
    results = []
    for _ in range(SIGHTINGS + 4):
        results.append(gradients(model, *arguments))
        with torch.no_grad():
            model.loss(*arguments)  # leaves other weights in the buffers
    assert fused.graphs is not None
    assert len(fused.graphs.captured) == 1, fused.graphs.off
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("router", [{}, SIGMOID, BESIDE], ids=["softmax", "sigmoid", "beside"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_on_batches_of_the_host_waits_for_nothing(policy: Any, router: dict[str, Any]) -> None:
    from lit_qlora.fused import fuse
    from lit_qlora.settings import OptimizerConfig, TrainConfig
    from lit_qlora.train.optim import make_optimizer

    model = model_of(dropout=0.1, **router)
    fused = fuse(model)
    fused.set_recompute([policy] * 2)
    optimizer = make_optimizer(model.named_parameters(), OptimizerConfig(), TrainConfig(), flatten=fused.flatten)
    tokens, labels = (tensor.cpu() for tensor in LAYOUTS["cudnn"]())
    labels[:, ::3] = IGNORE
    arguments = [tensor.pin_memory() for tensor in (tokens, labels)]

    def step() -> None:
        for _ in range(2):
            (model.loss(*arguments) / 100).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and pins what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def curve(model: GPT, flatten: Any, **settings: Any) -> torch.Tensor:
    """The losses of 200 steps on four random batches that come again and again."""
    from lit_qlora.settings import OptimizerConfig, TrainConfig
    from lit_qlora.train.optim import make_optimizer

    config, train = OptimizerConfig(**settings), TrainConfig(learning_rate=2e-3)
    optimizer = make_optimizer(model.named_parameters(), config, train, flatten=flatten)
    losses = []
    for step in range(200):
        torch.manual_seed(step % 4)
        tokens, labels = LAYOUTS["cudnn"]()
        loss = model.loss(tokens, labels) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_two_hundred_steps_are_those_of_the_plain_path() -> None:
    from lit_qlora.fused import fuse

    model = model_of()
    plain = copy.deepcopy(model)
    theirs, ours = (curve(*of).view(10, 20).mean(dim=1) for of in ((plain, None), (model, fuse(model).flatten)))
    assert ours[-1] < 0.8 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged-adamw8bit", "lion8bit"])
def test_few_tensors_of_all_adapters_learn_the_bits_that_the_adapters_do(name: str) -> None:
    from lit_qlora.fused import fuse

    found = []
    for flat in (False, True):
        model = model_of(r=32)  # adapters of 4,096 elements and more, below which bitsandbytes keeps 32 bits
        fused = fuse(model)
        found.append([curve(model, fused.flatten if flat else None, name=name), *lora_state(model).values()])
        assert len(fused.flat) == (2 if flat else 0)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_experts_may_have_ranks_of_their_own() -> None:
    from lit_qlora.fused import fuse, why_not
    from lit_qlora.lora.layer import add_lora
    from lit_qlora.settings import LoRAConfig
    from tests.conftest import tiny_model
    from tests.gpu.test_fused_gpu import SHAPE

    model = tiny_model(std=0.05, **SHAPE | EXPERTS | ALL).to("cuda", torch.bfloat16)
    add_lora(model, LoRAConfig(r=32, targets=("all",), dropout=0.0, rank_pattern={"experts.*": 8}))
    for tensor in lora_state(model).values():
        torch.nn.init.normal_(tensor, std=0.05)
    model.train()
    exact_model, plain_model = in_float64(model), copy.deepcopy(model)
    assert why_not(model) == ""
    fuse(model)
    arguments = LAYOUTS["cudnn"]()
    exact = gradients(exact_model, *arguments)[1]
    ours, theirs = (errors(gradients(of, *arguments)[1], exact) for of in (model, plain_model))
    assert max(ours) < 2 * max(theirs)
