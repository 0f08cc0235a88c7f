"""Attention asks what the GPU has, and plain torch computes what its fast implementations do not."""

from itertools import pairwise

import pytest
import torch

from lit_qlora.fused import attention
from lit_qlora.fused.attention import Heads, Layout, _with_sinks, has_flash, has_kernel
from lit_qlora.kernels.attention import Scores, attend, attend_backward
from lit_qlora.kernels.launch import AVAILABLE
from tests.kernels.test_attention import DEVICE, meaning

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "size", "runs"),
    [
        ((7, 5), 128, False),
        ((8, 0), 128, True),
        ((8, 9), 208, False),
        ((9, 0), 208, True),
        ((12, 0), 256, True),
        ((9, 0), 320, False),
        ((9, 0), 100, False),
    ],
)
def test_flash_attention_is_taken_where_it_runs(
    capability: tuple[int, int], size: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash.__wrapped__(size, CUDA) == runs


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_whose_gradients_differ_each_time_computes_no_deterministic_run(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert attention._takes_cudnn(Heads(32, 8, 128), Layout(2, 2048, 2048)) != deterministic


def test_a_cpu_has_no_flash_attention() -> None:
    assert not has_flash(128, torch.device("cpu"))


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
@pytest.mark.parametrize("cap", [None, 4.0])
def test_sum_and_output_of_the_whole_softmax_give_the_gradients_with_sinks(cap: float | None) -> None:
    """The backward pass of attention knows no sinks: flash attention's is of the same form as the kernel's."""
    ends, scores = [0, 11, 40], Scores(0.4, cap, window=20)
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    sinks, d_out = 2 * torch.randn(4, dtype=torch.float64), torch.randn(40, 4, 16, dtype=torch.float64)
    exact = meaning(q, k, v, ends, scores, sinks)
    gradients = torch.autograd.grad(exact, (q, k, v), d_out)

    own = [x.detach().float().to(DEVICE) for x in (q, k, v)]
    layout = torch.tensor(ends, dtype=torch.int32, device=DEVICE), 29
    out, log_sum = attend(*own, scores, *layout)
    out, log_sum = _with_sinks(out, log_sum.T, sinks.float().to(DEVICE))
    back = attend_backward(d_out.float().to(DEVICE), *own, out, log_sum.T.contiguous(), scores, *layout)
    for ours, theirs in zip((out, *back), (exact, *gradients), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=1e-4, atol=2e-5)


def test_documents_end_with_their_chunks_where_windows_are_chunks() -> None:
    cpu = torch.device("cpu")
    segments = torch.tensor([[0] * 5 + [1] * 3, [0] * 7 + [-1]])
    layout = Layout.of(2, 8, segments, cpu, chunk=3)
    assert layout.of_window(None) == layout
    chunked = layout.of_window(3)
    assert (layout.ends.tolist(), chunked.ends.tolist()) == ([0, 5, 8, 15, 16], [0, 3, 5, 8, 11, 14, 15, 16])
    assert (layout.longest, chunked.longest) == (7, 3)
    assert Layout.of(2, 8, None, cpu, chunk=3).of_window(3).ends.tolist() == [0, 3, 6, 8, 11, 14, 16]
    assert Layout.of(2, 8, None, cpu, chunk=8).of_window(8).ends is None
    assert Layout.of(2, 8, segments, cpu).of_window(3).longest == 7


def test_tokens_behind_a_shared_beginning_see_what_lies_in_their_chunk() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 6]])  # a second document follows on the first four tokens
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    layout = Layout.of(1, 8, segments, torch.device("cpu"), positions, chunk=3).of_window(3)
    assert layout.ends.tolist() == [0, 3, 5, 7, 8]
    tree = layout.tree
    runs = [tree.keys[first:end].tolist() for first, end in pairwise(tree.ends.tolist())]
    assert runs == [[0, 1, 2], [3, 4], [3, 5, 6], [7]]
    assert (tree.longest, tree.keys[tree.own].tolist()) == (3, list(range(8)))


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_heads_too_large_for_flash_attention_have_a_kernel() -> None:
    heads, layout = Heads(2, 1, 272, window=9), Layout(2, 15, 15)
    torch.manual_seed(0)
    *parts, d_out = (torch.randn(30, count, 272, device=DEVICE).half() for count in (2, 1, 1, 2))
    q, k, v = (part.float().requires_grad_() for part in parts)
    expected = attention._plain(q, k, v, heads, layout)
    gradients = torch.autograd.grad(expected, (q, k, v), d_out.flatten(1).float())
    out, saved = attention.attention(*parts, heads, layout)
    assert saved is not None  # plain attention saves nothing and is computed again
    back = attention.attention_backward(d_out.flatten(1), *parts, out, saved, heads, layout)
    for ours, theirs in zip((out, *back), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("size", "kib", "runs"),
    [(512, 227, True), (272, 227, True), (528, 227, False), (300, 227, False), (256, 227, False), (512, 163, False)],
)
def test_the_kernel_is_taken_for_heads_beyond_flash_attention(size: int, kib: int, runs: bool) -> None:
    assert has_kernel(size, kib * 2**10) == runs


def test_gradients_of_shared_beginnings_are_sums_whose_parts_have_no_token_twice() -> None:
    """A GPU adds rows of one token in any order, and a resumed run would differ."""
    positions = torch.tensor([[0, 1, 2, 2, 3, 2, 1, 2]])  # the runs behind the first follow on 2, 2 and 1 of its tokens
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])
    tree = Layout.of(1, 8, segments, torch.device("cpu"), positions).tree
    assert tree is not None
    parts = [tree.keys[others].tolist() for others in tree.others]
    assert parts == [[0, 1], [0, 1], [0]]
    d = torch.randn(len(tree.keys), 2, 3, dtype=torch.float64)
    expected = torch.zeros(8, 2, 3, dtype=torch.float64).index_add_(0, tree.keys, d)
    torch.testing.assert_close(tree.summed(d), expected)
