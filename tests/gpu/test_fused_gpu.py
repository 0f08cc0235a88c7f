"""On a GPU in bf16 the fast path is no farther from float64 than the plain one; every setting gives the same bits."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.lora.layer import LoRALinear, add_lora, lora_state
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.quantize import QuantizedLinear, quantize_linears
from lit_qlora.settings import LoRAConfig, Scheme, Target
from tests.conftest import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = {
    "n_embd": 256,
    "n_head": 4,
    "n_kv_head": 2,
    "head_size": 64,
    "ffn_size": 704,
    "vocab_size": 1024,
    "block_size": 512,
}


def adapted(
    scheme: Scheme = "bnb.nf4",
    targets: tuple[Target, ...] = ("all",),
    r: int = 16,
    dropout: float = 0.0,
    **changes: Any,
) -> GPT:
    model = tiny_model(std=0.05, **SHAPE | changes).to("cuda", torch.bfloat16)
    quantize_linears(model, scheme)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=targets, dropout=dropout))
    for tensor in lora_state(model).values():
        nn.init.normal_(tensor, std=0.05)
    return model.train()


def in_float64(model: GPT) -> GPT:
    """The same model with its dequantised weights in float64."""
    exact = copy.deepcopy(model)
    for path, module in list(exact.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="cuda")
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.data
            exact.set_submodule(path, linear.requires_grad_(False))
    return exact.double()


def gradients(model: GPT, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model.loss(*arguments)
    (loss / 100).backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def errors(one: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    return [float((one[name] - exact[name]).norm() / exact[name].norm()) for name in exact]


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 1024, (rows, length + 1), device="cuda")
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def packed(rows: int, length: int) -> tuple[Tensor, ...]:
    tokens, labels = batch(rows, length)
    lengths = [length // 3, length // 5, length - length // 3 - length // 5]
    segments = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device="cuda").expand(rows, -1)
    positions = torch.tensor([j for n in lengths for j in range(n)], device="cuda").expand(rows, -1)
    return tokens, labels, torch.rand(labels.shape, device="cuda"), positions, segments


LAYOUTS = {
    "cudnn": lambda: batch(2, 256),
    "flash": lambda: batch(3, 100),
    "one short sample": lambda: batch(1, 37),
    "packed": lambda: packed(2, 256),
}
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, query and value": {"targets": ("query", "value"), "r": 8},
    "int8, rank 64": {"scheme": "bnb.int8", "r": 64},
    "bf16": {"scheme": "none"},
    "biases, all heads": {"scheme": "bnb.fp4", "qkv_bias": True, "n_kv_head": 4},
    "one key head": {"n_kv_head": 1},
    "windows": {"sliding_window": 48},
    "layer norms, parallel, GELU": {
        "norm": "layer",
        "ffn": "gelu_tanh",
        "parallel_residual": True,
        "shared_norm": True,
        "mlp_bias": True,
    },
    "norms around and on queries, GeGLU": {
        "norm": "rms_plus_one",
        "norm_position": "both",
        "qk_norm": "head",
        "ffn": "geglu_tanh",
        "logit_softcap": 20.0,
    },
    "interleaved RoPE, heads of 128": {"rope_interleaved": True, "head_size": 128},
    "rank 128": {"r": 128},
    "adapted head": {"targets": ("all", "head")},
    "norms on queries and keys": {"qk_norm": "head", "head_size": 128},
    "norms behind half a rotation": {"qk_norm": "head", "qk_norm_after_rope": True, "rope_fraction": 0.5},
    "capped scores": {"attention_softcap": 5.0, "sliding_window": 48, "head_size": 128},
    "capped scores, heads of 256": {"attention_softcap": 5.0, "head_size": 256, "norm": "rms_plus_one"},
    "sinks": {"attention_sinks": True, "sliding_window": 48},
    "nf4-dq, scales that fill no block": {"scheme": "bnb.nf4-dq", "n_embd": 192, "n_head": 3, "n_kv_head": 1},
    "nf4-dq": {"scheme": "bnb.nf4-dq", "n_embd": 512, "n_head": 8, "n_kv_head": 4, "ffn_size": 1024},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_errors_are_no_larger_than_those_of_the_plain_path(kind: str, layout: str) -> None:
    assert_as_near_as_plain(adapted(**MODELS[kind]), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["mlp", "attn", "offload", "full", "full-offload"])
def test_recomputing_and_offloading_change_no_bit(policy: Any, layout: str) -> None:
    from lit_qlora.fused import fuse

    model = adapted(dropout=0.1)
    assert_recomputing_changes_no_bit(model, fuse(model), LAYOUTS[layout](), policy)


def assert_as_near_as_plain(model: GPT, layout: str, most: float = 1.0, of_loss: float = 2e-3) -> None:
    """Take the fast path, and compare the errors of both against float64 over four micro-batches.

    Every tensor counts alike. Gradients of queries and keys can be differences of numbers that are much larger (values
    with a bias do that), so that one rounding decides about several tensors at once; a sum of errors would judge by
    these alone.

    Args:
        most: the mean ratio of the errors of the gradients.
        of_loss: the largest error of the loss, relative.
    """
    from lit_qlora.fused import fuse, why_not

    assert why_not(model) == ""
    exact_model, plain_model = in_float64(model), copy.deepcopy(model)
    fuse(model)
    ratios: list[float] = []
    for seed in range(4):
        torch.manual_seed(seed)
        arguments = LAYOUTS[layout]()
        exact_loss, exact = gradients(exact_model, *arguments)
        plain = gradients(plain_model, *arguments)[1]
        loss, fast = gradients(model, *arguments)
        ours, theirs = errors(fast, exact), errors(plain, exact)
        assert max(ours) < 2 * max(theirs)
        assert abs(loss - exact_loss) < of_loss * exact_loss
        ratios += [one / other for one, other in zip(ours, theirs, strict=True)]
    assert statistics.geometric_mean(ratios) < most, statistics.geometric_mean(ratios)


def assert_recomputing_changes_no_bit(model: GPT, fused: Any, arguments: Any, policy: Any) -> None:
    results = []
    for policies in (["none", "none"], [policy, "none"], [policy, policy]):
        fused.set_recompute(policies)
        fused.blocks[0].sends_qkv = True  # which few blocks as narrow as these do
        torch.manual_seed(3)
        results.append(gradients(model, *arguments)[1])
    for name in results[0]:
        assert torch.equal(results[1][name], results[0][name]), name
        assert torch.equal(results[2][name], results[0][name]), name


def test_tensors_on_their_way_to_the_host_are_referenced_until_they_have_arrived(monkeypatch: Any) -> None:
    from lit_qlora.fused import fuse
    from lit_qlora.fused.memory import FastSizes
    from lit_qlora.fused.offload import MOST_LEAVING

    model = adapted(dropout=0.1)
    fused = fuse(model)
    monkeypatch.setattr(FastSizes, "keeps_mlp", lambda *_: False)
    fused.set_recompute(["offload", "offload"])
    off = fused.offload
    for _ in range(2):
        loss = model.loss(*batch(2, 256))
        assert off.count == len(off.pinned) == 5  # input and attended of two blocks, and one's middle
        assert off.held == 2  # the last block's middle and qkv
        assert len(off.leaving) == MOST_LEAVING - 2
        loss.backward()
        assert not off.leaving
        assert not off.coming


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_carried_over_to_the_next_forward_pass_change_no_bit(layout: str, monkeypatch: Any) -> None:
    from lit_qlora.fused import fuse
    from lit_qlora.fused.memory import FastSizes

    found = []
    for stays in ([False, False], [True, True]):
        monkeypatch.setattr(FastSizes, "carries", lambda *_, stays=stays: stays)
        model = adapted(**MODELS["nf4"])
        fused = fuse(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            one = gradients(model, *LAYOUTS[layout]())
            optimizer.step()
        assert (fused.extra_bytes > 0) == stays[0]
        found.append(one)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_blocks_change_no_bit(layout: str) -> None:
    from lit_qlora.fused import fuse

    found = []
    for blocks in (0, 2):
        model = adapted(**MODELS["nf4"])
        fuse(model, cached_blocks=blocks)
        found.append(gradients(model, *LAYOUTS[layout]()))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_dropout_keeps_the_mean_of_the_gradient() -> None:
    from lit_qlora.fused import fuse

    model = adapted(dropout=0.2)
    arguments = batch(2, 256)
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    without = gradients(model.eval(), *arguments)[1]
    model.train()
    fuse(model)
    draws = [gradients(model, *arguments)[1] for _ in range(60)]
    name = "blocks.0.attn.query.lora_b"
    mean = torch.stack([draw[name] for draw in draws]).mean(0)
    spread = torch.stack([draw[name] for draw in draws]).std(0).norm() / len(draws) ** 0.5
    assert float((mean - without[name]).norm()) < 3 * float(spread) + 0.02 * float(without[name].norm())
    assert not torch.equal(draws[0][name], draws[1][name])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_on_batches_of_the_host_waits_for_nothing(policy: Any, layout: str) -> None:
    from lit_qlora.fused import fuse

    model = adapted("bnb.nf4", dropout=0.1)
    fused = fuse(model)
    fused.set_recompute([policy] * 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tokens, labels, *others = (tensor.cpu() for tensor in LAYOUTS[layout]())
    labels[:, ::3] = IGNORE
    arguments = [tensor.pin_memory() for tensor in (tokens, labels, *others)]

    def step() -> None:
        for _ in range(2):
            (model.loss(*arguments) / 100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and pins what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_labels_that_are_skipped_on_the_host_change_nothing() -> None:
    from lit_qlora.fused import fuse

    model = adapted()
    fuse(model)
    tokens, labels = batch(2, 256)
    labels[:, ::3] = IGNORE
    loss, everywhere = gradients(model, tokens, labels)
    again, chosen = gradients(model, tokens.cpu(), labels.cpu())
    torch.testing.assert_close(loss, again)
    assert max(errors(chosen, everywhere)) < 1e-2
