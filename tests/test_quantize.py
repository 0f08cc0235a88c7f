"""4- and 8-bit weights are bitsandbytes' own, bit for bit, and gradients flow through them whatever happened before."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, bits_per_weight, quantize_linears, storage_bytes
from lit_qlora.settings import SCHEMES, LoRAConfig, Scheme
from tests.conftest import tiny_config, tiny_model

QUANTIZED = [scheme for scheme in SCHEMES if scheme != "none"]
FOUR_BIT = [scheme for scheme in QUANTIZED if scheme != "bnb.int8"]
SHAPES = [(64, 64), (7, 13), (1, 64), (33, 96), (320, 1000)]
TOKENS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))


def functional() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_four_bit_weights_are_those_of_bitsandbytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    packed, state = functional().quantize_4bit(
        weight, blocksize=64, quant_type=scheme[4:7], compress_statistics=scheme.endswith("-dq")
    )
    layer = QuantizedLinear(weight, None, scheme)
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.dequantize(), functional().dequantize_4bit(packed, state))
    assert layer.dequantize().dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weights_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed, absmax, _ = functional().int8_vectorwise_quant(weight)
    layer = QuantizedLinear(weight, None, "bnb.int8")
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.absmax, absmax)
    assert torch.equal(layer.dequantize(), functional().int8_vectorwise_dequant(packed, absmax))


def test_int8_keeps_rows_of_zeros() -> None:
    assert not QuantizedLinear(torch.zeros(2, 64), None, "bnb.int8").dequantize().any()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_bf16_weights_are_not_rounded_through_fp16(scheme: Scheme) -> None:
    weight = torch.full((64, 64), 1e5, dtype=torch.bfloat16)  # more than float16 can hold
    torch.testing.assert_close(QuantizedLinear(weight, None, scheme).dequantize(), weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_forward_and_backward_use_the_dequantised_weight(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(33, 96), torch.randn(33)
    layer, plain = QuantizedLinear(weight, bias, scheme), nn.Linear(96, 33)
    plain.weight.data, plain.bias.data = layer.dequantize(), bias
    results = []
    x, d_y = torch.randn(2, 5, 96), torch.randn(2, 5, 33)
    for linear in (layer, plain):
        leaf = x.clone().requires_grad_()
        y = linear(leaf)
        y.backward(d_y)
        results.append((y.detach(), leaf.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_survive_an_evaluation(scheme: Scheme, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    quantize_linears(model, scheme)
    add_lora(model, LoRAConfig(dropout=0.0))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.train().loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(TOKENS)
    after = gradients()
    assert any(bool(gradient.any()) for gradient in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_fresh_adapter_on_a_quantised_base_changes_nothing(scheme: Scheme) -> None:
    model = tiny_model()
    quantize_linears(model, scheme)
    with torch.no_grad():
        before = model(TOKENS)
        add_lora(model, LoRAConfig(targets="all"))
        assert torch.equal(model.train()(TOKENS), before)


def test_the_head_stays_in_full_precision_unless_asked_for() -> None:
    kept, quantised = tiny_model(), tiny_model()
    quantize_linears(kept, "bnb.nf4")
    quantize_linears(quantised, "bnb.nf4", head=True)
    assert type(kept.head) is nn.Linear
    assert isinstance(quantised.head, QuantizedLinear)
    assert all(isinstance(module, QuantizedLinear) for module in (kept.blocks[0].attn.query, kept.blocks[1].mlp.down))


def test_embeddings_and_norms_are_left_alone() -> None:
    before, after = tiny_model(), tiny_model()
    quantize_linears(after, "bnb.nf4")
    assert torch.equal(after.embed.weight, before.embed.weight)
    assert torch.equal(after.blocks[0].norm_1.weight, before.blocks[0].norm_1.weight)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_change_of_dtype_leaves_the_scales_alone(scheme: Scheme) -> None:
    layer = QuantizedLinear(torch.randn(64, 64), None, scheme)
    before = layer.dequantize()
    assert torch.equal(nn.Sequential(layer).to(torch.bfloat16)[0].dequantize(), before)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_state_dict_loads_back_strictly(scheme: Scheme) -> None:
    one, other = tiny_model(seed=0), tiny_model(seed=1)
    quantize_linears(one, scheme)
    quantize_linears(other, scheme)
    other.load_state_dict(one.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(TOKENS), one(TOKENS))


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("bnb.nf4", 4.5), ("bnb.fp4", 4.5), ("bnb.nf4-dq", 4 + 8 / 64 + 32 / 64 / 256), ("bnb.int8", 8.0)],
)
def test_storage_is_what_the_paper_says(scheme: Scheme, bits: float) -> None:
    layer = QuantizedLinear(torch.randn(512, 512), None, scheme)
    constant = 16 * 4 + (256 * 4 + 4 if scheme.endswith("-dq") else 0)  # code books, once a layer here
    rows = 512 * 4 if scheme == "bnb.int8" else 0
    assert bits_per_weight(scheme, torch.bfloat16) == bits
    stored = sum(storage_bytes(layer).values()) - (0 if scheme == "bnb.int8" else constant) - rows
    assert stored == pytest.approx(512 * 512 * bits / 8)


def test_autocast_decides_the_dtype_of_the_product() -> None:
    layer = QuantizedLinear(torch.randn(64, 64), torch.randn(64), "bnb.nf4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_a_quantised_model_with_an_adapter_learns() -> None:
    model = tiny_model()
    quantize_linears(model, "bnb.nf4-dq")
    add_lora(model, LoRAConfig(targets="all", dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(bool(t.any()) for name, t in lora_state(model).items() if name.endswith("lora_b"))


def test_importing_and_quantising_reaches_no_network_and_says_nothing() -> None:
    program = """
import socket
def refuse(*_): raise OSError("no network")
socket.socket.connect = refuse
import torch
from lit_qlora.quantize import QuantizedLinear
layer = QuantizedLinear(torch.randn(64, 64), None, "bnb.nf4-dq")
layer(torch.randn(2, 64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_quantising_twice_is_harmless() -> None:
    model = GPT(tiny_config())
    quantize_linears(model, "bnb.nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_linears(model, "bnb.nf4")
    assert isinstance(model.blocks[0].attn.query, QuantizedLinear)
