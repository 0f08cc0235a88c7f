"""FP8 on a GPU: products are those of the rounded operands, steps wait for nothing, graphs repeat them bit for bit."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.device import has_fp8
from tests.gpu.test_fused_gpu import (
    LAYOUTS,
    MODELS,
    adapted,
    assert_recomputing_changes_no_bit,
    batch,
    errors,
    gradients,
    in_float64,
)
from tests.gpu.test_graphs_gpu import batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8(), reason="needs a CUDA device of compute capability 8.9"),
]
SHAPES: dict[str, tuple[Any, ...]] = {
    "7B, qkv": ((4096, 4096, 4096), 4096, 16, (True, False, True)),
    "7B, down": ((4096,), 11008, 16, (True,)),
    "7B, gate and up": ((11008, 11008), 4096, 8, (True, True)),
    "8B, qkv": ((4096, 1024, 1024), 4096, 64, (True, True, True)),
    "1B, qkv": ((2048, 512, 512), 2048, 8, (True, False, True)),
    "0.5B, qkv, rank 3": ((896, 128, 128), 896, 3, (True, True, True)),
    "phi-2, no adapter": ((2560,), 2560, 8, (False,)),
    "rank 128": ((1024, 1024), 512, 128, (True, True)),
}
"""Rows, K, r and which of the layers learn."""
SCHEMES = ["none", "bnb.nf4", "bnb.nf4-dq", "bnb.int8"]


@pytest.mark.parametrize("tokens", [1, 37, 1000])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_rounded_operands(shape: str, scheme: Any, tokens: int) -> None:
    """What is left is the rounding of what comes out, once for the product and once for the adapter."""
    from tests.fused.test_fp8 import errors_of_products, make_group

    rows, k, r, learns = SHAPES[shape]
    if scheme == "bnb.nf4-dq" and (len(rows) > 1 and any(n * k // 64 % 256 for n in rows[:-1])):
        pytest.skip("blocks of these shapes do not stack")
    errors_found = errors_of_products(make_group(rows, k, r, learns, scheme, bias=True, dtype=torch.bfloat16), tokens)
    assert max(errors_found.values()) < 5e-3, errors_found


@pytest.mark.parametrize("kind", ["nf4", "bf16", "int8, rank 64", "nf4-dq", "biases, all heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_point_where_those_of_float64_do(kind: str, layout: str) -> None:
    from lit_qlora.fused import fuse

    model = adapted(**MODELS[kind])
    exact_model = in_float64(model)
    fuse(model, fp8=True)
    torch.manual_seed(0)
    arguments = LAYOUTS[layout]()
    exact_loss, exact = gradients(exact_model, *arguments)
    loss, found = gradients(model, *arguments)
    assert abs(loss - exact_loss) < 1e-2 * exact_loss
    away = errors(found, exact)
    print(f"{kind}, {layout}: loss {float(loss / exact_loss - 1):+.1e}, gradients {statistics.median(away):.3f}")
    assert statistics.median(away) < 0.25


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
@pytest.mark.parametrize("policy", ["mlp", "attn", "offload", "full", "full-offload"])
def test_recomputing_and_offloading_change_no_bit(policy: Any, kind: str) -> None:
    from lit_qlora.fused import fuse

    model = adapted(**MODELS[kind] | {"dropout": 0.1})
    assert_recomputing_changes_no_bit(model, fuse(model, fp8=True), batch(2, 256), policy)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_waits_for_nothing(policy: Any) -> None:
    from lit_qlora.fused import fuse

    model = adapted("bnb.nf4", dropout=0.1)
    fuse(model, fp8=True).set_recompute([policy] * 2)
    arguments = [tensor.cpu().pin_memory() for tensor in batch(2, 256)]
    (model.loss(*arguments) / 100).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (model.loss(*arguments) / 100).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_give_the_same_bits() -> None:
    from lit_qlora.fused import fuse

    def gradients_of(graph_tokens: int) -> list[Tensor]:
        model = adapted(**MODELS["nf4"])
        fused = fuse(model, graph_tokens=1024, fp8=True)
        assert fused.graphs is not None
        if not graph_tokens:
            fused.graphs.off = "the same, but launched one by one"
        found = [torch.cat([g.flatten() for g in gradients(model, *one)[1].values()]) for one in batches(16 * 6)]
        assert bool(fused.graphs.captured) == bool(graph_tokens)
        return found

    for one, other in zip(gradients_of(1024), gradients_of(0), strict=True):
        assert torch.equal(one, other)


def test_a_nan_is_not_hidden() -> None:
    from lit_qlora.fused import fuse

    model = adapted("none")
    other = copy.deepcopy(model)
    other.get_parameter("blocks.0.mlp.up.base.weight").data[5, 7] = float("nan")
    fuse(model, fp8=True)
    fuse(other, fp8=True)
    arguments = batch(1, 64)
    with torch.no_grad():
        assert torch.isfinite(model.loss(*arguments))
        assert not torch.isfinite(other.loss(*arguments))
