"""FlashAttention 4 is as near to float64 as torch's flash attention, for rows and documents, on strided views."""

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import attention, flash_4
from lit_qlora.fused.attention import Heads, Layout
from lit_qlora.fused.flash_4 import why_not

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
