"""FlashAttention 4 is as near to float64 as torch's flash attention, for rows and documents, on strided views."""

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import attention, flash_4
from lit_qlora.fused.attention import Heads, Layout
from lit_qlora.fused.flash_4 import why_not
from lit_qlora.fused.large_rank import Sum, grad_a, grad_b
from lit_qlora.kernels.stack import Stack

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def computed(qkv: Tensor, d_out: Tensor, heads: Heads, layout: Layout) -> tuple[Tensor, ...]:
    """The output and the gradients; those of float64 come from plain torch on the host."""
    parts = heads.split(qkv)
    out, saved = attention.attention(*parts, heads, layout)
    return out, *attention.attention_backward(d_out, *parts, out, saved, heads, layout)


def layout(kind: str, device: torch.device) -> Layout:
    """Of 1,024 tokens."""
    if kind == "rows":
        return Layout.of(2, 512, None, device)
    if kind == "short rows":
        return Layout.of(16, 64, None, device)
    if kind == "many short documents":
        ends = torch.tensor([*range(0, 1024, 3), 1024], dtype=torch.int32, device=device)
        return Layout(2, 512, 3, ends)
    if kind == "documents, some of them empty":
        ends = torch.tensor([0, 200, 201, 512, 640, 1024, 1024, 1024], dtype=torch.int32, device=device)
        return Layout(2, 512, 512, ends)
    segments = torch.tensor([[0] * 300 + [1] * 212] * 2)
    positions = torch.tensor([[*range(300), *range(100, 312)]] * 2)
    return Layout.of(2, 512, segments, device, shared=positions)


@pytest.mark.parametrize(
    ("query", "key", "size", "dtype"),
    [
        (8, 2, 128, torch.bfloat16),
        (8, 2, 128, torch.float16),
        (4, 4, 128, torch.bfloat16),
        (8, 2, 64, torch.bfloat16),
        (4, 2, 96, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "kind", ["rows", "short rows", "documents, some of them empty", "many short documents", "a shared beginning"]
)
def test_it_is_as_near_to_float64_as_torchs(
    kind: str, window: int | None, query: int, key: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_not(torch.cuda.get_device_capability(), size):
        pytest.skip(reason)
    torch.manual_seed(0)
    sinks = torch.randn(query, device=CUDA) if window else None
    heads = Heads(query, key, size, None, window, sinks=sinks)
    # Behind queries, keys and values there is something else.
    qkv = torch.randn(1024, (query + 2 * key) * size + 24, device=CUDA, dtype=dtype)
    d_out = torch.randn(1024, query * size, device=CUDA, dtype=dtype)
    in_double = Heads(query, key, size, None, window, sinks=None if sinks is None else sinks.cpu().double())
    exact = computed(qkv.double().cpu(), d_out.double().cpu(), in_double, layout(kind, torch.device("cpu")))
    assert attention._takes_flash_4(qkv, heads, layout(kind, CUDA))
    found = computed(qkv, d_out, heads, layout(kind, CUDA))
    monkeypatch.setattr(flash_4, "takes", lambda *_: False)
    torchs = computed(qkv, d_out, heads, layout(kind, CUDA))
    for one, other, right in zip(found, torchs, exact, strict=True):
        error, usual = ((x.double().cpu() - right).norm() / right.norm() for x in (one, other))
        assert error < 1.1 * usual + 1e-4


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "kind", ["rows", "short rows", "documents, some of them empty", "many short documents", "a shared beginning"]
)
@pytest.mark.parametrize(("query", "key", "size"), [(8, 2, 128), (4, 4, 128), (8, 2, 64), (4, 2, 96)])
def test_wider_rows_get_the_same_output_and_give_the_same_gradients(
    query: int, key: int, size: int, kind: str, window: int | None
) -> None:
    if reason := why_not(torch.cuda.get_device_capability(), size):
        pytest.skip(reason)
    torch.manual_seed(0)
    heads = Heads(query, key, size, None, window, sinks=torch.randn(query, device=CUDA) if window else None)
    qkv = torch.randn(1024, (query + 2 * key) * size, device=CUDA, dtype=torch.bfloat16)
    d_out = torch.randn(1024, query * size, device=CUDA, dtype=torch.bfloat16)
    wide = torch.ones(1024, query * size + 16, device=CUDA, dtype=torch.bfloat16)
    parts, where, results = heads.split(qkv), layout(kind, CUDA), list[tuple[Tensor, ...]]()
    torch.use_deterministic_algorithms(True)
    try:
        for room in (None, wide[:, :-16]):
            out, saved = attention.attention(*parts, heads, where, room)
            results.append((out, *attention.attention_backward(d_out, *parts, out, saved, heads, where)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert results[1][0].data_ptr() == wide.data_ptr()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert (wide[:, -16:] == 1).all()


@pytest.mark.parametrize("rank", [64, 256])
def test_large_adapters_have_the_same_gradients_from_wider_rows(rank: int) -> None:
    """So that a block whose output of attention was on the host, where rows touch, has those of other blocks."""
    torch.manual_seed(0)
    wide = torch.randn(4096, 4096 + rank, device=CUDA, dtype=torch.bfloat16)
    dz, dy = (torch.randn(4096, n, device=CUDA, dtype=torch.bfloat16) for n in (rank, 4096))
    x, z, stack, results = wide[:, :4096], wide[:, 4096:], Stack((4096,), (0,), rank), list[tuple[Tensor, Tensor]]()
    for rows, of_rows in ((x, z), (x.contiguous(), z.contiguous())):
        of_a, of_b = (Sum(torch.zeros(shape, device=CUDA)) for shape in ((rank, 4096), (4096, rank)))
        grad_a(rows, dz, of_a, 1.0)
        grad_b(dy, of_rows, of_b, stack)
        results.append((of_a.total, of_b.total))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_an_output_with_rows_that_are_not_aligned_has_the_same_gradients() -> None:
    """The output lies beside Z, whose rank may be any."""
    heads, where = Heads(4, 2, 128), Layout.of(2, 512, None, CUDA)
    if reason := why_not(torch.cuda.get_device_capability(), heads.size):
        pytest.skip(reason)
    torch.manual_seed(0)
    qkv = torch.randn(1024, 8 * 128, device=CUDA, dtype=torch.bfloat16)
    d_out = torch.randn(1024, 4 * 128, device=CUDA, dtype=torch.bfloat16)
    parts = heads.split(qkv)
    out, saved = attention.attention(*parts, heads, where)
    beside = torch.cat((out, out[:, :3]), dim=1)[:, :512]
    torch.use_deterministic_algorithms(True)
    try:
        one = attention.attention_backward(d_out, *parts, out, saved, heads, where)
        other = attention.attention_backward(d_out, *parts, beside, saved, heads, where)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
